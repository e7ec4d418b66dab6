"""The random part of a training step: noise, times, masks and caption drops, each from its own counter-based stream.

A draw is a function of (seed, purpose, step, position in the global batch), so it is the same whatever the layout.

Shapes: `b` images here, `S` tokens of an image, `K` tokens kept, `c` latent channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ecdit.diffusion.flow import logit_normal
from ecdit.diffusion.masking import keep_count, keep_indices, ratio_at
from ecdit.recipe import Recipe
from parallel.philox import key_of, normal, uniform


@dataclass
class Draws:
    """noise (b, c, h, w), t (b,), keep (b, K) or None where nothing is masked."""

    noise: Tensor
    t: Tensor
    keep: Tensor | None


def draw(recipe: Recipe, step: int, positions: Tensor) -> Draws:
    """Draws for the images at these positions (b,) of the step's global batch, on their device."""
    model, seed = recipe.model, recipe.train.seed
    latent = (model.channels, model.side, model.side)
    noise = normal(key_of(seed, "noise", step), positions, model.channels * model.side**2)
    time = recipe.diffusion.time
    t = logit_normal(normal(key_of(seed, "time", step), positions, 1)[:, 0], time.mean, time.std)
    ratio = ratio_at(recipe.masking.schedule, step)
    keep = None
    if ratio:
        places = uniform(key_of(seed, "mask", step), positions, model.tokens)
        keep = keep_indices(places, keep_count(model.tokens, ratio))
    return Draws(noise.view(-1, *latent), t, keep)


def dropped_captions(recipe: Recipe, step: int, positions: Tensor) -> Tensor:
    """(b,) True for the share `diffusion.text_drop` of the captions, which the empty one stands for. On positions'
    device."""
    return uniform(key_of(recipe.train.seed, "text", step), positions, 1)[:, 0] < recipe.diffusion.text_drop


def posterior_noise(recipe: Recipe, step: int, positions: Tensor) -> Tensor:
    """Noise (b, c, h, w) that draws latents from the autoencoder's posterior."""
    channels, side = recipe.model.channels, recipe.model.side
    drawn = normal(key_of(recipe.train.seed, "posterior", step), positions, channels * side**2)
    return drawn.view(-1, channels, side, side)


def seed_noise(seeds: list[int], channels: int, side: int, device: torch.device) -> Tensor:
    """Noise (b, c, h, w) that a sample starts from: a function of its own seed alone."""
    counters = torch.tensor(seeds, dtype=torch.int64, device=device)
    return normal(key_of(0, "sample"), counters, channels * side**2).view(-1, channels, side, side)
