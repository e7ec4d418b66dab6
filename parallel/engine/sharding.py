"""Which part of every tensor a rank updates: equal slices of flat buffers, here of megatron-core DDP's buckets.

A *unit* is a tensor of the model, or one expert's matrix of an expert weight; all ranks number the units of the whole
model alike. Tensor, expert and pipeline parallelism give a rank a block of a tensor, and its slice of a bucket cuts
that anywhere; a `Piece` is the part of one unit that lies in it. Every element of the model is updated by one rank,
or, where tensor ranks have copies of a weight, by one rank of each copy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint.boxes import Boxes, view_as_boxes
from parallel.parameters import is_whole
from parallel.topology import Topology


@dataclass
class Span:
    """Part of a unit: where it lies in this rank's block of a parameter. `start` counts elements of the flattened
    block."""

    parameter: str
    unit: tuple[str, int]
    start: int


@dataclass
class Piece(Span):
    """Flat views of this rank's weights and gradients. `copy`: whether another tensor rank counts these elements."""

    weights: Tensor
    gradients: Tensor
    decay: bool
    copy: bool


class Buckets:
    """The buckets whose gradients are reduced over one group, and this rank's pieces of them."""

    def __init__(self, buffers: list, names: dict[nn.Parameter, str], group: dist.ProcessGroup, copy_rank: bool):
        """`copy_rank`: whether another tensor rank counts what all of them have."""
        self.group = group
        self.buckets = [bucket for buffer in buffers for bucket in buffer.buckets]
        self.pieces = [p for buffer in buffers for p in self._pieces(buffer, names, copy_rank)]

    def _pieces(self, buffer, names: dict[nn.Parameter, str], copy_rank: bool) -> Iterator[Piece]:
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // self.group.size()
            first = self.group.rank() * size
            for parameter in bucket.params_list:
                name = names[parameter]
                begin = buffer.param_index_map[parameter][0] - bucket.offset  # of the block in the bucket
                for unit, low, high in units_of(name, parameter):
                    low, high = max(first, begin + low), min(first + size, begin + high)
                    if low < high:
                        yield Piece(
                            name,
                            unit,
                            low - begin,
                            bucket.param_data.view(-1)[low:high],
                            bucket.grad_data.view(-1)[low:high],
                            parameter.ndim > 1,
                            copy_rank and is_whole(parameter) and not parameter.expert,
                        )

    def gather_weights(self) -> None:
        """Sends every rank the slices that the others have updated."""
        if self.group.size() == 1:
            return
        for bucket in self.buckets:
            flat = bucket.param_data.view(-1)
            size = flat.numel() // self.group.size()
            own = flat[self.group.rank() * size :][:size].clone()
            dist.all_gather_into_tensor(flat, own, group=self.group)


def units_of(name: str, parameter: nn.Parameter) -> Iterator[tuple[tuple[str, int], int, int]]:
    """The units that a rank's block has part of: (parameter, number), and where each lies in the flattened block."""
    count = parameter.shape[0] if parameter.stacked else 1
    size = parameter.numel() // count
    for i in range(count):
        yield (name, parameter.block.offset[0] + i if parameter.stacked else 0), i * size, (i + 1) * size


class Catalogue:
    """All parameters and units of the whole model, also of other pipeline stages, the same on every rank."""

    def __init__(self, names: dict[nn.Parameter, str], topology: Topology):
        here = {name: (p.block.whole, p.stacked) for p, name in names.items()}
        everywhere = [here] * topology.ranks
        if topology.ranks > 1:
            dist.all_gather_object(everywhere, here)
        self.wholes: dict[str, tuple[int, ...]] = {}
        self.unit_numels: list[int] = []
        self._numbers: dict[tuple[str, int], int] = {}
        for name, (whole, stacked) in sorted({n: v for part in everywhere for n, v in part.items()}.items()):
            self.wholes[name] = whole
            count = whole[0] if stacked else 1
            for unit in range(count):
                self._numbers[name, unit] = len(self.unit_numels)
                self.unit_numels.append(torch.Size(whole).numel() // count)
        self._blocks = {name: (p.block, tuple(p.shape)) for p, name in names.items()}

    def number(self, span: Span) -> int:
        """Of its unit, among the units of the whole model."""
        return self._numbers[span.unit]

    def boxes(self, spans: Sequence[Span], values: list[Tensor]) -> dict[str, Boxes]:
        """What this rank has of each tensor, by parameter: views of its values for its spans."""
        parts: dict[str, list] = {}
        for span, value in zip(spans, values, strict=True):
            block, shape = self._blocks[span.parameter]
            parts.setdefault(span.parameter, []).extend(view_as_boxes(block.offset, shape, span.start, value.detach()))
        return {name: Boxes(self.wholes[name], boxes) for name, boxes in parts.items()}
