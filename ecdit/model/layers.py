"""The parts that every block is made of: parameters that know how they are initialised, linears, AdaLN, MLPs.

Shapes: `B` images, `S` tokens of an image, `D` hidden.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.philox import key_of, normal_at


def parameter(*shape: int, std: float, expert: bool = False) -> nn.Parameter:
    """An uninitialised parameter that `initialize` fills with normals of deviation `std`; 0: zeros.

    `expert`: dim 0 counts experts, which are sharded over expert-parallel ranks and clipped one by one.
    """
    weight = nn.Parameter(torch.empty(*shape))
    weight.init_std = std
    weight.expert = expert
    return weight


def xavier(fan_in: int, fan_out: int) -> float:
    """Deviation of Glorot and Bengio 2010."""
    return math.sqrt(2 / (fan_in + fan_out))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fills every parameter from (seed, its name, the global index of each element) and nothing else.

    So any rank can fill any shard alone, and every layout starts from the same model.
    """
    for name, weight in model.named_parameters():
        if weight.init_std == 0:
            weight.zero_()
        else:
            values = normal_at(key_of(seed, "weights", name), 0, weight.numel(), device=weight.device)
            weight.copy_(values.view_as(weight).mul_(weight.init_std))


class Linear(nn.Module):
    """x W^T + b. `std=None`: Xavier; `std=0`: a projection that starts as zero."""

    def __init__(self, fan_in: int, fan_out: int, *, bias: bool = False, std: float | None = None):
        super().__init__()
        self.weight = parameter(fan_out, fan_in, std=xavier(fan_in, fan_out) if std is None else std)
        self.bias = parameter(fan_out, std=0.0) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: LayerNorm without affine, then shift and scale. x (B, S, D); shift, scale (B, D)."""
    return torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale[:, None])
