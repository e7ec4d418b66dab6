"""Rows that travel as FP8 and are computed with in the model's own type.

A tensor of FP8 has no gradient but one of FP8. So its numbers go beside a tensor of the model's type that has the shape
of the rows, takes no memory, and carries their gradient.

Shapes: `M` rows, `D` hidden.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallel import kernels
from parallel.kernels import operator, power_of_two, warps

FP8 = torch.float8_e4m3fn


class Fp8Rows(NamedTuple):
    """carrier (M, D): of the model's type; its gradient is the rows', its numbers are nothing. numbers (M, D): FP8.
    scale (M,): fp32; a row is its numbers times its scale."""

    carrier: Tensor
    numbers: Tensor
    scale: Tensor

    def split(self, sizes: Sequence[int]) -> list["Fp8Rows"]:
        """Consecutive rows of these sizes."""
        return [Fp8Rows(*parts) for parts in zip(*(x.split(sizes) for x in self), strict=True)]

    def widened(self) -> Tensor:
        """In the type of the carrier, which gets the gradient as it is: (M, D)."""
        return _Widened.apply(*self)

    @property
    def shape(self) -> torch.Size:
        """(M, D)."""
        return self.carrier.shape


def plain(rows: Tensor | Fp8Rows) -> Tensor:
    """Rows to compute with, in the model's type."""
    return rows.widened() if isinstance(rows, Fp8Rows) else rows


def carrier(like: Tensor, rows: int) -> Tensor:
    """What carries the gradient of rows whose numbers are elsewhere, of the type and width of `like`."""
    return like.new_zeros(()).expand(rows, like.shape[1])


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(_ctx, carrier: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
        return widen(numbers, scale, carrier.dtype)

    @staticmethod
    def backward(_ctx, grad: Tensor):
        return grad, None, None


def widen(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows in another type: (M, D), (M,) -> (M, D)."""
    return widen_into(torch.empty(numbers.shape, dtype=dtype, device=numbers.device), numbers, scale)


def widen_into(out: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """The rows in the type of `out` (M, D), which they are written to and which is returned."""
    if not kernels.use_triton(numbers):
        return out.copy_(numbers.float() * scale[:, None])
    _widen(numbers, scale, out)
    return out


@operator("widen(Tensor numbers, Tensor scale, Tensor(a!) out)")
def _widen(numbers: Tensor, scale: Tensor, out: Tensor) -> None:
    from parallel.kernels import fp8_rows_triton

    (rows, width), block = out.shape, power_of_two(out.shape[1])
    fp8_rows_triton.widen[(rows,)](numbers, scale, out, width, BLOCK=block, num_warps=warps(block))
