"""Solvers of the sampling ODE dx/dt = v(x, t), from noise at t = 0 to data at t = 1."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 to 1. `shift` > 1 spends more of them near noise: with s = 1 - t the map of Stable
    Diffusion 3, s -> shift s / (1 + (shift - 1) s), on an even grid."""
    noise = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (1 - shift * noise / (1 + (shift - 1) * noise)).tolist()


def euler(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """One evaluation a step; first order."""
    for t, after in pairwise(grid):
        x = x + (after - t) * velocity(x, t)
    return x


def heun(velocity: Velocity, x: Tensor, grid: Sequence[float]) -> Tensor:
    """Two evaluations a step; second order."""
    for t, after in pairwise(grid):
        first = velocity(x, t)
        second = velocity(x + (after - t) * first, after)
        x = x + (after - t) / 2 * (first + second)
    return x


def guide(with_text: Tensor, without: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022): scale 1 is the conditional velocity, 0 the unconditional."""
    return torch.lerp(without, with_text, scale)
