"""GELU, and what it makes of a gradient, into some rows of every expert, which lie apart.

Torch computes elementwise at the memory's rate where all lies in one run, and at half of it where it does not.

Shapes: `E` experts, `R` rows of each, `F` hidden; the (R, F) of an expert lie in one run.
"""

import torch
from torch import Tensor

from parallel import kernels
from parallel.kernels import operator, warps

BLOCK = 4096


def gelu_into(out: Tensor, x: Tensor) -> None:
    """GELU(x) in its tanh form. out, x (E, R, F)."""
    if kernels.use_triton(x):
        _gelu(x, out)
    else:
        torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def gelu_backward_into(out: Tensor, grad: Tensor, x: Tensor) -> None:
    """The gradient of x, where `grad` is GELU(x)'s. out, grad, x (E, R, F)."""
    if kernels.use_triton(x):
        _gelu_backward(grad, x, out)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)


@operator("gelu(Tensor x, Tensor(a!) out)")
def _gelu(x: Tensor, out: Tensor) -> None:
    from ecdit.model.kernels import gelu_triton

    gelu_triton.forward[_grid(x)](x, out, x[0].numel(), x.stride(0), out.stride(0), BLOCK=BLOCK, num_warps=warps(BLOCK))


@operator("gelu_backward(Tensor grad, Tensor x, Tensor(a!) out)")
def _gelu_backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
    from ecdit.model.kernels import gelu_triton

    strides = grad.stride(0), x.stride(0), out.stride(0)
    gelu_triton.backward[_grid(x)](grad, x, out, x[0].numel(), *strides, BLOCK=BLOCK, num_warps=warps(BLOCK))


def _grid(x: Tensor) -> tuple[int, int]:
    return -(-x[0].numel() // BLOCK), len(x)
