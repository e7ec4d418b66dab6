"""Fixed embeddings: sine-cosine features of the time and of the tokens' places in the picture.

Shapes: `B` images, `S` tokens of an image, `D` hidden.
"""

import math

import torch
from torch import Tensor, nn

TIME_FEATURES = 256
TIME_SCALE = 1000.0  # t in [0, 1] is spread over the range that the features' frequencies are made for


def sine_cosine(positions: Tensor, width: int) -> Tensor:
    """Positions (N,) -> (N, width) in float32: cosines, then sines, at frequencies from 1 down to 1/10000.

    The angles are computed in float64: fp32 would be off by 1e-4 at a position of 1000.
    """
    half = width // 2
    exponents = torch.arange(half, device=positions.device, dtype=torch.float64) / half
    angles = positions.double()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def time_features(t: Tensor) -> Tensor:
    """Times (B,) in [0, 1] -> (B, TIME_FEATURES)."""
    return sine_cosine(TIME_SCALE * t, TIME_FEATURES)


def grid_positions(side: int, width: int) -> Tensor:
    """Positions of side * side tokens, row by row -> (S, width): half for the row, half for the column."""
    places = torch.arange(side * side, device="cpu")
    rows, columns = places // side, places % side
    return torch.cat([sine_cosine(rows, width // 2), sine_cosine(columns, width // 2)], dim=-1)


class Positions(nn.Module):
    """Adds fixed positions. They are no state of the model: made on the CPU, and moved to where they are used."""

    def __init__(self, side: int, width: int):
        super().__init__()
        self.tokens = side * side
        self._table = grid_positions(side, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        if self._table.device != x.device or self._table.dtype != x.dtype:
            self._table = self._table.to(x)
        return x + self._table
