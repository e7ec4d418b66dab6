"""What the project's Triton kernels share: when they are used, and how torch knows of them.

Each kernel stands beside a twin in plain torch, behind one function that asks `use_triton`. What launches a kernel is
registered as an operator of torch that writes into tensors made by its caller. So the planner, which runs the model on
the meta device, sees what a kernel reads, writes and keeps, and neither it nor a machine without a GPU needs Triton,
which is imported where a kernel is launched and nowhere else.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("ecdit", "DEF")


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def use_triton(tensor: Tensor) -> bool:
    """Whether a kernel computes what depends on this tensor, and not its twin. Kernels have no float64."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and _installed()


def operator(schema: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function that launches kernels the operator `ecdit::NAME`; `schema` marks what it writes: "(a!)".

    On the meta device it does nothing.
    """

    def register(launch: Callable[..., None]) -> Callable[..., None]:
        name = schema.partition("(")[0]
        _LIBRARY.define(f"{schema} -> ()")
        _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, _nothing, "Meta")
        return getattr(torch.ops.ecdit, name).default

    return register


def power_of_two(n: int) -> int:
    """The least that is not below n: the sizes that Triton's blocks have."""
    return 1 << (n - 1).bit_length()


def warps(block: int) -> int:
    """Warps for a program that holds a block of so many elements: about 16 of them a thread."""
    return min(16, max(1, block // 512))


def _nothing(*_tensors: object) -> None:
    """A tensor on the meta device has no elements to write."""
