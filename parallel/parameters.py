"""Parameters that know which block of the whole model's tensor they are, and how that block is initialised.

So a rank fills its own shard alone, from the seed, the parameter's name and the elements' global indices: every layout
starts from the same model, and no rank ever holds more than its share.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.philox import key_of, normal_at

CHUNK = 1 << 22  # numbers drawn at once where rows are cut: of each row, only this rank's part is kept


@dataclass(frozen=True)
class Split:
    """One of equal parts of a tensor along a dimension."""

    dim: int
    part: int
    parts: int


@dataclass(frozen=True)
class Block:
    """Where a shard lies in the whole tensor: its shape, and the index of the shard's first element."""

    whole: tuple[int, ...]
    offset: tuple[int, ...]

    def of(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """The part of a whole tensor that a shard of this shape is, a view."""
        return tensor[tuple(slice(o, o + n) for o, n in zip(self.offset, shape, strict=True))]


def parameter(
    *whole: int,
    std: float,
    splits: tuple[Split, ...] = (),
    expert: bool = False,
    reads_own_tokens: bool = False,
) -> nn.Parameter:
    """An uninitialised parameter of the whole shape, or the part of it that `splits` leave.

    `initialize` fills it with normals of deviation `std`; 0: zeros. `expert`: dim 0 counts experts, which are clipped
    one by one and whose gradients are summed over expert-data ranks. `reads_own_tokens`: it is applied to
    `Spread.own_tokens`, so under tensor parallelism its gradient is always to be summed.
    """
    shape, offset = list(whole), [0] * len(whole)
    for split in splits:
        shape[split.dim] //= split.parts
        offset[split.dim] = split.part * shape[split.dim]
    weight = describe(nn.Parameter(torch.empty(*shape)), std, Block(whole, tuple(offset)))
    weight.expert = weight.stacked = expert
    weight.reads_own_tokens = reads_own_tokens
    return weight


def describe(weight: nn.Parameter, std: float, block: Block) -> nn.Parameter:
    """Gives a parameter, such as one that a library made, what `initialize` and the engine need to know of it.

    expert: of an expert-parallel layer. stacked: dim 0 counts experts. number: its expert's, where a library counts
    those of a rank from 0 in the names.
    """
    weight.init_std, weight.block = std, block
    weight.expert = weight.stacked = weight.reads_own_tokens = False
    weight.number = None
    return weight


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names that mean the same on every rank: an expert is called by its number among all."""
    for name, weight in model.named_parameters():
        yield name if weight.number is None else f"{name.rstrip('0123456789')}{weight.number}", weight


def is_whole(weight: nn.Parameter) -> bool:
    """Whether this rank has all of the tensor."""
    return tuple(weight.shape) == weight.block.whole


def xavier(fan_in: int, fan_out: int) -> float:
    """Deviation of Glorot and Bengio 2010."""
    return math.sqrt(2 / (fan_in + fan_out))


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fills every parameter from (seed, its name, the global index of each element) and nothing else."""
    for name, weight in named_parameters(model):
        if weight.init_std == 0:
            weight.zero_()
        else:
            _fill(weight, key_of(seed, "weights", name), weight.block.whole, weight.block.offset, 0)
            weight.mul_(weight.init_std)


def _fill(out: Tensor, key: int, whole: tuple[int, ...], offset: tuple[int, ...], start: int) -> None:
    """Writes the block of a tensor whose first element is number `start` of the sequence of `key`."""
    inner = math.prod(whole[1:])
    if tuple(out.shape[1:]) == whole[1:]:  # one run of the sequence
        first = start + offset[0] * inner
        out.copy_(normal_at(key, first, out.numel(), device=out.device).view_as(out))
    elif out.ndim == 2:  # rows that are cut: whole rows are drawn, a few at a time
        rows = max(1, CHUNK // inner)
        for row in range(0, len(out), rows):
            part = out[row : row + rows]
            drawn = normal_at(key, start + (offset[0] + row) * inner, len(part) * inner, device=out.device)
            part.copy_(drawn.view(len(part), inner)[:, offset[1] : offset[1] + out.shape[1]])
    else:
        for i in range(len(out)):
            _fill(out[i], key, whole[1:], offset[1:], start + (offset[0] + i) * inner)
