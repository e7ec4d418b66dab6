"""The training loss of a micro-batch: velocity of the kept tokens, routing's auxiliary loss, the decoder's MAE term.

Shapes: `b` images, `S` tokens of an image, `K` tokens kept, `L` text tokens, `Y` text width, `P` numbers in a patch.
"""

from dataclasses import dataclass

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


def objective(model: nn.Module, batch: MicroBatch, recipe: Recipe) -> tuple[Tensor, Tensor, Output]:
    """The velocity loss (1) of each image (b,), the weighted sum of the other losses (scalar), and the output."""
    keep, patch = batch.draws.keep, recipe.model.patch
    x_t, velocity = interpolate(batch.latents, batch.draws.noise, batch.draws.t)
    out = model(x_t, batch.draws.t, batch.text, batch.text_mask, keep=keep)
    target, predicted = patchify(velocity, patch), out.velocity
    extra = recipe.model.aux_loss * out.aux
    if keep is not None:
        target = gather_tokens(target, keep)
        if recipe.model.decoder.layers:
            predicted = gather_tokens(predicted, keep)
            noisy = mae_target(patchify(x_t, patch))
            extra = extra + recipe.masking.mae * mae_loss(out.velocity, noisy, keep).mean()
    return velocity_loss(predicted, target), extra, out
