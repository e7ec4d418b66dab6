"""Masked training: which tokens of an image enter the backbone, and the decoder's reconstruction term.

Shapes: `B` images, `S` tokens of an image, `K` tokens kept, `D` hidden, `P` numbers in a patch.
"""

import torch
from torch import Tensor


def keep_count(tokens: int, ratio: float) -> int:
    """K, the tokens that stay when the share `ratio` is masked."""
    return int(tokens * (1 - ratio))


def ratio_at(schedule: list[tuple[int, float]], step: int) -> float:
    """The ratio of the last (from step, ratio) pair that has begun."""
    return [ratio for start, ratio in schedule if start <= step][-1]


def keep_indices(chance: Tensor, keep: int) -> Tensor:
    """A uniformly random subset of `keep` tokens of each image, ascending. chance (B, S), uniform -> (B, keep)."""
    return chance.argsort(dim=1, stable=True)[:, :keep].sort(dim=1).values


def gather_tokens(x: Tensor, keep: Tensor) -> Tensor:
    """The kept tokens. x (B, S, D), keep (B, K) -> (B, K, D)."""
    return x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))


def scatter_tokens(x: Tensor, keep: Tensor, fill: Tensor) -> Tensor:
    """Puts kept tokens back in their places. x (B, K, D), keep (B, K), fill (B, S, D), the others -> (B, S, D)."""
    return fill.to(x.dtype).scatter(1, keep[..., None].expand_as(x), x)


def mae_target(patches: Tensor) -> Tensor:
    """Each patch with its own mean 0 and variance 1. (B, S, P) -> (B, S, P)."""
    mean = patches.mean(-1, keepdim=True)
    variance = patches.var(-1, keepdim=True, correction=0)
    return (patches - mean) / (variance + 1e-6).sqrt()


def mae_loss(predicted: Tensor, target: Tensor, keep: Tensor) -> Tensor:
    """Mean squared error over the masked tokens of each image, in fp32. (B, S, P), keep (B, K) -> (B,).

    MaskDiT (Zheng et al. 2023) reconstructs the noisy input; its target here is `mae_target` of x_t.
    """
    error = (predicted.float() - target.float()).square().mean(-1)  # (B, S)
    masked = torch.ones_like(error).scatter(1, keep, 0.0)
    return (error * masked).sum(1) / (error.shape[1] - keep.shape[1])
