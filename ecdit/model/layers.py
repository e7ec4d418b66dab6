"""The small parts that every block is made of: GELU, MLPs."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.layers import Linear


class Mlp(nn.Module):
    """Two linears of one width with an activation between them."""

    def __init__(self, fan_in: int, width: int, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.up = Linear(fan_in, width, bias=True)
        self.down = Linear(width, width, bias=True)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, the one that the project uses everywhere."""
    return F.gelu(x, approximate="tanh")
