"""The expert all-to-all of expert-choice routing: equal splits known beforehand, so no counts travel and no rank waits
for the host.

Every expert has the same number of slots in every group, so each rank sends each expert-parallel peer the same number
of rows, forward and backward. A rank's own rows never enter the all-to-all. In chunks of experts, the rows of the next
chunk travel while those of one are computed.

Order of the slots on the wire: by chunk, then by owner (the other ranks ascending, then this one), then by the
owner's experts of that chunk, then by row. `arrange` brings a routing plan into it, so that gathering the tokens of
the slots writes the send buffer directly.

Rows may travel to their experts as FP8, each with its scale; results and gradients travel in the model's type.

Shapes: `E` experts, `R` slots of an expert here, `M = E R`, `D` hidden, `n` expert-parallel ranks, `e` experts of a
rank and chunk.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from parallel.fp8_rows import FP8, Fp8Rows, carrier, plain, widen
from parallel.spread import ExpertFunction


class Exchange:
    """Rows to the experts of all expert-parallel ranks and back."""

    def __init__(self, groups: ProcessGroupCollection, experts: int, chunks: int = 1):
        self._group, self._expert_tensor, self.chunks = groups.ep, groups.expt_tp, chunks
        self._ranks, self._me = groups.ep.size(), groups.ep.rank()
        self._experts = experts // self._ranks // chunks  # e
        self._splits = [int(rank != self._me) for rank in range(self._ranks)]  # in units of e R rows
        self._span = _tensor_peers(groups)

    def arrange(self, of_slot: Tensor) -> Tensor:
        """Values of slots (E R,), expert-major, in the order of the wire."""
        return self._me_last(of_slot.view(self._ranks, self.chunks, -1), 0).transpose(0, 1).reshape(-1)

    def __call__(self, rows: Tensor | Fp8Rows, experts: ExpertFunction, *, spanning: bool = False) -> Tensor:
        """Computes every slot's row by its expert, wherever that is. rows (M, D), in the order of the wire -> (M, D).

        `spanning`: tensor ranks have tokens of the same groups, so a slot's row comes from one of them and zeros from
        the others; they are summed before the expert, which then has no more rows than it would.
        """
        size = rows.shape[0] // self._ranks // self.chunks  # rows of one owner and chunk
        pieces = rows.split([(self._ranks - 1) * size, size] * self.chunks)
        remote, own = list(pieces[::2]), pieces[1::2]
        there, back = ([self._flight(size) for _ in range(self.chunks)] for _ in range(2))
        remote = [self._launch(part, flight) for part, flight in zip(remote, there, strict=True)]
        results = []
        for c in range(self.chunks):
            arrived = self._land(remote[c], there[c])
            x = torch.cat([_by_expert(part, self._experts, size) for part in (arrived, plain(own[c]))], dim=1)
            y = self._compute(x, experts, c, spanning).transpose(0, 1)  # (n, e, R, D)
            # one split, whose gradient is one concatenation; slices would each fill a whole tensor with zeros
            others, mine = y.split([self._ranks - 1, 1])
            results.append((self._launch(others.flatten(0, 2), back[c]), mine.flatten(0, 2)))
        landed = [(self._land(there, flight), here) for (there, here), flight in zip(results, back, strict=True)]
        return torch.cat([part for pair in landed for part in pair])

    def _flight(self, size: int) -> "_Flight | None":
        """None where there is nobody to send to."""
        return _Flight(self._group, [size * n for n in self._splits]) if self._ranks > 1 else None

    def _launch(self, rows: Tensor | Fp8Rows, flight: "_Flight | None") -> Tensor:
        if flight is None:
            return plain(rows)
        return _Launch.apply(*rows, flight) if isinstance(rows, Fp8Rows) else _Launch.apply(rows, None, None, flight)

    def _land(self, arriving: Tensor, flight: "_Flight | None") -> Tensor:
        return arriving if flight is None else _Land.apply(arriving, flight)

    def _compute(self, x: Tensor, experts: ExpertFunction, chunk: int, spanning: bool) -> Tensor:
        """x (e, n, R, D), this rank's rows last -> the same shape."""
        if not spanning or self._span == 1:
            return self._over_expert_tensor(x.flatten(1, 2), experts, chunk).view(x.shape)
        x = torch.cat([x[:, : self._me], x[:, -1:], x[:, self._me : -1]], dim=1)  # by rank: tensor peers are neighbours
        x = x.unflatten(1, (-1, self._span)).sum(2)
        y = self._over_expert_tensor(x.flatten(1, 2), experts, chunk).view(x.shape)
        return self._me_last(y[:, :, None].expand(-1, -1, self._span, -1, -1).flatten(1, 2), 1)

    def _me_last(self, x: Tensor, dim: int) -> Tensor:
        """Parts of all ranks along a dimension, ascending -> the others ascending, then this one."""
        before, own, after = x.split([self._me, 1, self._ranks - 1 - self._me], dim=dim)
        return torch.cat([before, after, own], dim=dim)

    def _over_expert_tensor(self, x: Tensor, experts: ExpertFunction, chunk: int) -> Tensor:
        """Each rank has a slice of the hidden layer of its experts, so it computes all ranks' rows and the results are
        summed. x (e, rows, D) -> (e, rows, D)."""
        group = self._expert_tensor
        if group.size() == 1:
            return experts(x, chunk)
        rows = x.shape[1]
        everyone = mappings.gather_from_sequence_parallel_region(x.transpose(0, 1).contiguous(), group=group)
        y = experts(everyone.transpose(0, 1).contiguous(), chunk)
        y = mappings.reduce_scatter_to_sequence_parallel_region(y.transpose(0, 1).contiguous(), group=group)
        return y.view(rows, *x.shape[::2]).transpose(0, 1).contiguous()


def _by_expert(rows: Tensor, experts: int, size: int) -> Tensor:
    """Rows of some sources, source-major, (sources * e * R, D) -> a view (e, sources, R, D)."""
    return rows.view(-1, experts, size // experts, rows.shape[-1]).transpose(0, 1)


def _tensor_peers(groups: ProcessGroupCollection) -> int:
    """How many ranks of this rank's expert-parallel group are in its tensor-parallel group: consecutive ones."""
    expert, tensor = (dist.get_process_group_ranks(group) for group in (groups.ep, groups.tp))
    return len(set(expert) & set(tensor))


class _Flight:
    """One chunk's all-to-all, forward and later backward: the same splits both ways."""

    def __init__(self, group: dist.ProcessGroup, splits: list[int]):
        self._group, self._splits = group, splits
        self._arriving: list[tuple[dist.Work, Tensor]] = []

    def start(self, *parts: Tensor) -> Tensor:
        """Sends rows, or several tensors that make them up, ordered by the rank that they are for; returns the buffer
        that the first of theirs arrives in."""
        for part in parts:
            arriving = torch.empty_like(part, memory_format=torch.contiguous_format)
            work = dist.all_to_all_single(
                _bytes(arriving),
                _bytes(part.contiguous()),
                self._splits,
                self._splits,
                group=self._group,
                async_op=True,
            )
            self._arriving.append((work, arriving))
        return self._arriving[0][1]

    def land(self) -> list[Tensor]:
        """What has arrived: what comes after may read it. On a GPU this makes the stream wait, not the host."""
        arrived = []
        while self._arriving:
            work, part = self._arriving.pop(0)
            work.wait()
            arrived.append(part)
        return arrived


def _bytes(x: Tensor) -> Tensor:
    """FP8 travels as bytes, for not every library of collectives knows it."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


class _Launch(torch.autograd.Function):
    """Sends without waiting, rows or their FP8 numbers and scales. What it returns may be read only after `_Land`; its
    gradient has landed here, in the type of the rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, numbers: Tensor | None, scale: Tensor | None, flight: _Flight) -> Tensor:
        ctx.flight = flight
        if numbers is None:
            return flight.start(rows)
        flight.start(numbers, scale)
        return carrier(rows, len(rows))

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.flight.land()
        return grad, None, None, None


class _Land(torch.autograd.Function):
    """Waits for what `_Launch` has sent; backward it launches the gradient.

    Autograd runs the last made node first, so backward too all chunks are under way before the first is waited for.
    """

    @staticmethod
    def forward(ctx, arriving: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        arrived = flight.land()
        return arriving.view_as(arriving) if len(arrived) == 1 else widen(*arrived, arriving.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.flight.start(grad), None
