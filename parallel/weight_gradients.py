"""Weight gradients that the product which makes them adds to their fp32 sum.

megatron-core's DDP keeps such a sum of the gradients of a step's micro-batches, `weight.main_grad`, and a hook adds
what autograd returns. That writes every gradient and reads it again, and the sum with it. A product can add to the sum
itself, in fp32; the hook, which waits for a gradient, is then handed one that nobody has written, and a mark not to
look at it.

Shapes: `o` outputs, `i` inputs, `N` rows; perhaps a dimension of experts before them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sum_of(weight: Tensor) -> Tensor | None:
    """Where products are to add up the gradient of a weight; None: nowhere, it is autograd's to return.

    That is so under engines that keep no sum, where torch.compile reads the code, which adding to a sum is hidden from,
    and where torch has no product of bf16 with an fp32 result, as on a CPU.
    """
    if torch.compiler.is_compiling():
        return None
    total = getattr(weight, "main_grad", None)
    if total is None or total.dtype == weight.dtype or (weight.is_cuda and weight.dtype == torch.bfloat16):
        return total
    return None


def share_kept(weight: Tensor) -> float:
    """Of the sum, when a product adds to it: 0 if none has since it was cleared, for then it need not be read."""
    return float(getattr(weight, "whole", weight).grad_added_to_main_grad)


def handed_over(weight: Tensor) -> Tensor:
    """To be returned as the gradient of a weight when its sum has it."""
    if hasattr(weight, "whole"):  # which is told when all of its parts are done
        weight.handed_over[weight.number] = True
        return weight.new_empty(()).expand_as(weight)
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def parts(weight: Tensor, count: int) -> Sequence[Tensor]:
    """Equal parts of a weight along its first dimension, each with its part of the sum, if the weight has one."""
    if count == 1:
        return [weight]
    total = sum_of(weight)
    if total is None:
        return weight.chunk(count)
    handed = [False] * count
    found = _Parts.apply(weight, handed)
    for number, (part, part_of_sum) in enumerate(zip(found, total.chunk(count), strict=True)):
        part.main_grad, part.whole, part.handed_over, part.number = part_of_sum, weight, handed, number
    return found


class _Parts(torch.autograd.Function):
    """Parts whose gradients are in the sum when this one's turn has come, where products have added them, or are then
    added."""

    @staticmethod
    def forward(ctx, weight: Tensor, handed_over: list[bool]) -> tuple[Tensor, ...]:
        ctx.weight, ctx.handed_over = weight, handed_over
        return weight.chunk(len(handed_over))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        sums = sum_of(ctx.weight).chunk(len(grads))
        for grad, total, done in zip(grads, sums, ctx.handed_over, strict=True):
            if not done:
                total.add_(grad)
        return handed_over(ctx.weight), None


def weight_gradient(weight: Tensor, slope: Tensor, x: Tensor) -> Tensor:
    """To be returned as the gradient of a weight (o, i): slope (o, N) times x (N, i), or what stands for it."""
    total = sum_of(weight)
    if total is None:
        return slope @ x
    product = torch.addmm if total.ndim == 2 else torch.baddbmm
    widened = {} if x.dtype == total.dtype else {"out_dtype": total.dtype}
    product(total, slope, x, beta=share_kept(weight), out=total, **widened)
    return handed_over(weight)


class AccumulatingLinear(torch.autograd.Function):
    """x W^T + b, whose weight's gradient is added to its sum. x (..., i), weight (o, i), bias (o,) or None."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight  # itself: where activations are recomputed, what was saved comes back as another tensor
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), weight = ctx.saved_tensors, ctx.weight
        wanted, _, biased = ctx.needs_input_grad
        rows, slopes = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (
            grad @ weight if wanted else None,
            weight_gradient(weight, slopes.mT, rows),
            slopes.sum(0) if biased else None,
        )
