"""What carries rows between expert-parallel ranks: an all-to-all in which no rank has a part for itself.

Shapes: `n` ranks; every part is (n - 1, ...), a block for each of the others, ascending.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.fp8_rows import FP8

Copy = tuple[Tensor, Tensor]  # to, from


class Transport(Protocol):
    """One all-to-all after the other, each started and landed before the next. All ranks do the same."""

    def start(self, parts: list[Tensor], into: list[Tensor], here: list[Copy]) -> None:
        """Sends the parts, without waiting; what the others send comes into tensors of the same shapes. `here`: copies
        between tensors of this rank that are wanted by then, too."""

    def land(self) -> None:
        """What comes after may read what was to be copied, and write what was read. On a GPU this makes the stream
        wait, not the host."""


class Collective:
    """By the library of the group: between hosts, and on CPUs."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._splits = [int(rank != group.rank()) for rank in range(group.size())]
        self._works: list[dist.Work] = []
        self._copies: list[Copy] = []

    def start(self, parts: list[Tensor], into: list[Tensor], here: list[Copy]) -> None:
        self._copies = list(here)
        for part, place in zip(parts, into, strict=True):
            arriving = place if place.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
            work = dist.all_to_all_single(
                _bytes(arriving),
                _bytes(part.contiguous()),
                self._splits,
                self._splits,
                group=self._group,
                async_op=True,
            )
            self._works.append(work)
            if arriving is not place:
                self._copies.append((place, arriving))

    def land(self) -> None:
        for work in self._works:
            work.wait()
        for to, rows in self._copies:
            to.copy_(rows)
        self._works, self._copies = [], []


def _bytes(x: Tensor) -> Tensor:
    """FP8 travels as bytes, for not every library of collectives knows it."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
