"""Which part of every tensor a rank updates: equal slices of megatron-core DDP's flat buckets.

A *unit* is a tensor of the model, or one expert's matrix of an expert weight. A rank's slice of a bucket cuts units
anywhere; a `Piece` is the part of one unit that lies in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class Piece:
    """Part of a unit: flat views of this rank's weights and gradients, and where they lie in the parameter.

    `start` counts elements of the flattened parameter; `unit` numbers the units of all buckets.
    """

    parameter: str
    start: int
    weights: Tensor
    gradients: Tensor
    unit: int
    decay: bool


class Shard:
    """This rank's pieces of all buckets whose gradients are reduced over one group."""

    def __init__(self, buffers: list, names: dict[nn.Parameter, str], group: dist.ProcessGroup):
        self.group = group
        self.buckets = [bucket for buffer in buffers for bucket in buffer.buckets]
        self.unit_numels: list[int] = []
        self.pieces = [p for buffer in buffers for p in self._pieces(buffer, names)]
        self.shapes = {names[p]: p.shape for buffer in buffers for p in buffer.params}

    def _pieces(self, buffer, names: dict[nn.Parameter, str]) -> Iterator[Piece]:
        for bucket in buffer.buckets:
            size = bucket.grad_data.numel() // self.group.size()
            first = self.group.rank() * size
            for parameter in bucket.params_list:
                begin = buffer.param_index_map[parameter][0] - bucket.offset  # of the parameter in the bucket
                units = parameter.shape[0] if getattr(parameter, "expert", False) else 1
                unit = parameter.numel() // units
                for u in range(units):
                    self.unit_numels.append(unit)
                    low = max(first, begin + u * unit)
                    high = min(first + size, begin + (u + 1) * unit)
                    if low < high:
                        yield Piece(
                            names[parameter],
                            low - begin,
                            bucket.param_data.view(-1)[low:high],
                            bucket.grad_data.view(-1)[low:high],
                            len(self.unit_numels) - 1,
                            parameter.ndim > 1,
                        )

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over the group's ranks, in place."""
        if self.group.size() > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather_weights(self) -> None:
        """Sends every rank the slices that the others have updated."""
        if self.group.size() == 1:
            return
        for bucket in self.buckets:
            flat = bucket.param_data.view(-1)
            size = flat.numel() // self.group.size()
            own = flat[self.group.rank() * size :][:size].clone()
            dist.all_gather_into_tensor(flat, own, group=self.group)

    def whole(self, values: list[Tensor]) -> dict[str, Tensor]:
        """Tensors in the parameters' own shapes, in fp32 on the CPU, from every rank's values for its pieces."""
        full = {name: torch.zeros(shape.numel()) for name, shape in self.shapes.items()}
        for piece, value in zip(self.pieces, values, strict=True):
            full[piece.parameter][piece.start : piece.start + value.numel()] = value.detach().float().cpu()
        for name, flat in full.items():
            if self.group.size() > 1:  # each element is written by one rank, so the sum is exact
                summed = self.sum(flat.to(self.pieces[0].weights.device))
                flat = summed.cpu()
            full[name] = flat.view(self.shapes[name])
        return full

    def scatter(self, whole: dict[str, Tensor], values: list[Tensor]) -> None:
        """The reverse of `whole`: copies this rank's pieces of whole tensors into `values`."""
        for piece, value in zip(self.pieces, values, strict=True):
            flat = whole[piece.parameter].reshape(-1)
            value.copy_(flat[piece.start : piece.start + value.numel()])
