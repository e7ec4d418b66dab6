"""AdaLN: LayerNorm without affine, then a shift and a scale for each image.

The kernels keep a row's mean and deviation for the backward pass, in which they make the gradients of the row, of the
shift and of the scale in one reading; those of shift and scale are summed over an image in a fixed order.

Shapes: `B` images, `S` tokens of an image, `D` hidden, `P` parts of an image whose sums are added up last.
"""

import torch
from torch import Tensor

from parallel import kernels
from parallel.apex import layer_norm
from parallel.kernels import operator, power_of_two, warps

EPSILON = 1e-6
ROWS = 16  # tokens of a part: enough programs for small batches, and partial sums that are few beside the rows


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift. x (B, S, D); shift, scale (B, D) -> (B, S, D)."""
    if kernels.use_triton(x):
        return _Modulate.apply(x, shift, scale)
    return torch.addcmul(shift[:, None], layer_norm(x, EPSILON), 1 + scale[:, None])


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x, shift, scale = x.contiguous(), _rows(shift), _rows(scale)
        out = torch.empty_like(x)
        mean, inverse = x.new_empty(2, *x.shape[:2], dtype=torch.float32)
        _modulate(x, shift, scale, out, mean, inverse)
        ctx.save_for_backward(x, scale, mean, inverse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, mean, inverse = ctx.saved_tensors
        images, tokens, width = x.shape
        grad_x = torch.empty_like(x)
        sums = x.new_empty(2, images, -(-tokens // ROWS), width, dtype=torch.float32)
        _modulate_backward(grad.contiguous(), x, scale, mean, inverse, grad_x, sums)
        grad_shift, grad_scale = sums.sum(2).to(scale.dtype)
        return grad_x, grad_shift, grad_scale


def _rows(x: Tensor) -> Tensor:
    """As it is where its rows are: shift and scale are columns of one product."""
    return x if x.stride(-1) == 1 else x.contiguous()


@operator("modulate(Tensor x, Tensor shift, Tensor scale, Tensor(a!) out, Tensor(b!) mean, Tensor(c!) inverse)")
def _modulate(x: Tensor, shift: Tensor, scale: Tensor, out: Tensor, mean: Tensor, inverse: Tensor) -> None:
    """mean, inverse (B, S): of a row, its mean and the inverse of its deviation."""
    from ecdit.model.kernels import adaln_triton

    images, tokens, width = x.shape
    block = power_of_two(width)
    adaln_triton.forward[(images * tokens,)](
        x, shift, scale, out, mean, inverse, tokens, width, shift.stride(0), scale.stride(0), EPSILON, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip


@operator(
    "modulate_backward(Tensor grad, Tensor x, Tensor scale, Tensor mean, Tensor inverse, Tensor(a!) grad_x, "
    "Tensor(b!) sums)"
)
def _modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, mean: Tensor, inverse: Tensor, grad_x: Tensor, sums: Tensor
) -> None:
    """sums (2, B, P, D): the gradients of shift and of scale from each part of an image."""
    from ecdit.model.kernels import adaln_triton

    images, tokens, width = x.shape
    block = power_of_two(width)
    adaln_triton.backward[(images, sums.shape[2])](
        grad, x, scale, mean, inverse, grad_x, *sums, tokens, width, scale.stride(0), ROWS=ROWS, BLOCK=block,
        num_warps=warps(block),
    )  # fmt: skip
