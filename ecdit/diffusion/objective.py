"""The training loss of a micro-batch: velocity of the kept tokens, routing's auxiliary loss, the decoder's MAE term.

Shapes: `b` images, `S` tokens of an image, `K` tokens kept, `L` text tokens, `Y` text width, `P` numbers in a patch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecdit.diffusion.draws import Draws
from ecdit.diffusion.flow import interpolate, velocity_loss
from ecdit.diffusion.masking import gather_tokens, mae_loss, mae_target
from ecdit.diffusion.patch import patchify
from ecdit.model.dit import Output
from ecdit.recipe import Recipe


@dataclass
class MicroBatch:
    """latents (b, c, h, w), text (b, L, Y), text_mask (b, L), and the draws for them."""

    latents: Tensor
    text: Tensor
    text_mask: Tensor
    draws: Draws


def objective(
    model: nn.Module, batch: MicroBatch, recipe: Recipe, hidden: Tensor | None = None
) -> tuple[Tensor | None, Tensor, Output]:
    """The velocity loss (1) of each image (b,), the weighted sum of the other losses (scalar), and the output.

    On a pipeline stage that is not the last there is no velocity loss yet: None. hidden: what the stage before made.
    """
    keep, patch = batch.draws.keep, recipe.model.patch
    x_t, velocity = interpolate(batch.latents, batch.draws.noise, batch.draws.t)
    out = model(x_t, batch.draws.t, batch.text, batch.text_mask, keep=keep, hidden=hidden)
    target, predicted = patchify(velocity, patch), out.velocity
    extra = recipe.model.aux_loss * out.aux
    if predicted is None:
        return None, extra, out
    if keep is not None:
        target = gather_tokens(target, keep)
        if recipe.model.decoder.layers:
            predicted = gather_tokens(predicted, keep)
            noisy = mae_target(patchify(x_t, patch))
            extra = extra + recipe.masking.mae * mae_loss(out.velocity, noisy, keep).mean()
    return velocity_loss(predicted, target), extra, out


def to_differentiate(
    per_image: Tensor | None, extra: Tensor, out: Output, images: int, of: int
) -> tuple[Tensor, Tensor]:
    """What backward starts from, and this stage's part of the loss, for `images` of the `of` that a mean is taken of.

    On the last stage both are the scalar loss. On others the first is the output for the next stage, which carries
    this stage's losses with it: backward adds their gradient as if they were part of the sum.
    """
    extra = extra * (images / of)
    if per_image is None:
        return _Carry.apply(out.hidden, extra), extra
    total = per_image.sum() / of + extra
    return total, total


class _Carry(torch.autograd.Function):
    """A tensor, with a loss that has no other way to the end."""

    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, grad.new_ones((), dtype=torch.float32)
