"""Linears over tensor-parallel ranks, behind one interface with three makers.

`PlainLinears`, here: torch, on one tensor rank. `megatron.py`: megatron-core's column- and row-parallel linears,
sequence parallelism in them. `transformer_engine.py`: Transformer Engine's, on GPUs.

A *column* linear splits its outputs over the tensor ranks, a *row* linear its inputs. Under sequence parallelism each
rank holds the activations of its own images between them: a column linear gathers the images, a row linear sums over
the ranks and scatters. Images are dim 0, the dimension that the libraries split.

Shapes: `B` images, `n` tensor ranks, `i` inputs, `o` outputs.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from parallel.parameters import Block, Split, describe, parameter, xavier
from parallel.weight_gradients import AccumulatingLinear, sum_of


class Linear(nn.Module):
    """x W^T + b without communication. `std=None`: Xavier; `std=0`: a projection that starts as zero.

    `split`: only one of equal parts of the outputs.
    """

    def __init__(
        self, fan_in: int, fan_out: int, *, bias: bool = False, std: float | None = None, split: Split | None = None
    ):
        super().__init__()
        splits = () if split is None else (split,)
        std = xavier(fan_in, fan_out) if std is None else std
        self.weight = parameter(fan_out, fan_in, std=std, splits=splits)
        self.bias = parameter(fan_out, std=0.0, splits=splits) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o), or (..., o / n) where the outputs are split."""
        if sum_of(self.weight) is None:
            return F.linear(x, self.weight, self.bias)
        return AccumulatingLinear.apply(x, self.weight, self.bias)


class Linears(Protocol):
    """Makes the linears of a block. None of them has a bias."""

    def column(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        """(B, ..., i) -> (B, ..., o / n); under sequence parallelism from (B / n, ..., i)."""

    def row(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        """(B, ..., i / n) -> (B, ..., o); under sequence parallelism to (B / n, ..., o)."""


class PlainLinears:
    """For a single tensor rank."""

    def column(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        return Linear(fan_in, fan_out, std=std)

    row = column


def describe_linear(
    linear: nn.Module, fan_in: int, fan_out: int, *, dim: int, rank: int, std: float | None
) -> nn.Module:
    """Describes the weight of a library's linear, which is part `rank` of the whole one along `dim`."""
    offset = [0, 0]
    offset[dim] = rank * linear.weight.shape[dim]
    std = xavier(fan_in, fan_out) if std is None else std
    describe(linear.weight, std, Block((fan_out, fan_in), tuple(offset)))
    return linear
