"""The expert all-to-all of expert-choice routing: equal splits known beforehand, so no counts travel and no rank waits
for the host.

Every expert has the same number of slots in every group, so each rank sends each expert-parallel peer the same number
of rows, forward and backward. A rank's own rows never enter the all-to-all. In chunks of experts, the rows of the next
chunk travel while those of one are computed.

Order of the slots on the wire: first those that travel, by chunk, then by owner (the other ranks ascending), then by
the owner's experts of that chunk, then by row; then this rank's own, by expert and row. `arrange` brings a routing plan
into it, so that gathering the tokens of the slots writes what is sent.

Rows may travel to their experts as FP8, each with its scale; results and gradients travel in the model's type.

Shapes: `E` experts, `R` slots of an expert here, `M = E R`, `D` hidden, `n` expert-parallel ranks, `e` experts of a
rank and chunk, `c` chunks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from parallel.fp8_rows import Fp8Rows, plain, widen, widen_into
from parallel.spread import ExpertFunction
from parallel.transport import Transport

Between = Callable[..., Sequence[Tensor]]  # of the ways there and back, and what departed of each chunk


class Exchange:
    """Rows to the experts of all expert-parallel ranks and back. `transport`: makes what carries the rows of a box,
    there or back, of a chunk: there are twice as many as chunks."""

    def __init__(
        self,
        groups: ProcessGroupCollection,
        experts: int,
        chunks: int,
        transport: Callable[[int], Transport],
    ):
        self._expert_tensor, self._split, self.chunks = groups.expt_tp, groups.expt_tp.size() > 1, chunks
        self.ranks, self._me = groups.ep.size(), groups.ep.rank()
        self.experts = experts // self.ranks // chunks  # e
        self._span = _tensor_peers(groups)
        self.transport = transport

    def arrange(self, of_slot: Tensor) -> Tensor:
        """Values of slots (E R,), expert-major, in the order of the wire."""
        others, own = self._me_last(of_slot.view(self.ranks, self.chunks, -1), 0).split([self.ranks - 1, 1])
        return torch.cat([others.transpose(0, 1).flatten(), own.flatten()])

    @torch.compiler.disable  # it would make kernels of what copy engines are to copy
    def __call__(
        self,
        rows: Tensor | Fp8Rows,
        experts: ExpertFunction,
        *,
        spanning: bool = False,
        between: Between | None = None,
    ) -> Tensor:
        """Computes every slot's row by its expert, wherever that is. rows (M, D), in the order of the wire -> (M, D).

        `spanning`: tensor ranks have tokens of the same groups, so a slot's row comes from one of them and zeros from
        the others; they are summed before the expert, which then has no more rows than it would. `between`: computes
        all chunks by itself, where nothing but `experts` is to be done to their rows.
        """
        if self.ranks == 1:
            parts = plain(rows).view(self.chunks, self.experts, -1, rows.shape[-1])
            return torch.cat([self._over_expert_tensor(x, experts, c).flatten(0, 1) for c, x in enumerate(parts)])
        there, back = (Way(self, first) for first in (0, self.chunks))
        sent = _Depart.apply(there, *(rows if isinstance(rows, Fp8Rows) else (rows, None, None)))
        if between is not None and not self._split and not (spanning and self._span > 1):
            return _Home.apply(back, *between(there, back, *sent))
        results = []
        for c in range(self.chunks):
            x = _Enter.apply(there, c, sent[c])
            results.append(_Leave.apply(back, c, self._compute(x, experts, c, spanning)))
        return _Home.apply(back, *results)

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
        before, own, after = x.split([self._me, 1, self.ranks - 1 - self._me], dim=dim)
        return torch.cat([before, after, own], dim=dim)

    def _over_expert_tensor(self, x: Tensor, experts: ExpertFunction, chunk: int) -> Tensor:
        """Each rank has a slice of the hidden layer of its experts, so it computes all ranks' rows and the results are
        summed. x (e, rows, D) -> (e, rows, D)."""
        if not self._split:
            return experts(x, chunk)
        rows, group = x.shape[1], self._expert_tensor
        everyone = mappings.gather_from_sequence_parallel_region(x.transpose(0, 1).contiguous(), group=group)
        y = experts(everyone.transpose(0, 1).contiguous(), chunk)
        y = mappings.reduce_scatter_to_sequence_parallel_region(y.transpose(0, 1).contiguous(), group=group)
        return y.view(rows, *x.shape[::2]).transpose(0, 1).contiguous()


def _tensor_peers(groups: ProcessGroupCollection) -> int:
    """How many ranks of this rank's expert-parallel group are in its tensor-parallel group: consecutive ones."""
    expert, tensor = (dist.get_process_group_ranks(group) for group in (groups.ep, groups.tp))
    return len(set(expert) & set(tensor))


# ------------------------------------------------------------------------------------------------------ one way of it


class Way:
    """The rows of one call on their way to the experts or back, all chunks of them. Who has tokens lets them `depart`
    and takes them `home`; who has experts lets them `enter` and `leave`, a chunk at a time. What does not travel is
    here from the start (`own`), and may be put to its place at home (`own_home`) at any time.

    Shapes: as above; all chunks' experts of a rank are `c e`.
    """

    def __init__(self, exchange: Exchange, first_box: int):
        self._ranks, self._experts, self.chunks = exchange.ranks, exchange.experts, exchange.chunks
        self._boxes = [exchange.transport(first_box + c) for c in range(self.chunks)]
        self._coming: list[Tensor] = []  # what departed: (c e, n, R, ...), this rank's rows last
        self._own: list[Tensor] = []  # (c e, R, ...)
        self._whole: Tensor | None = None
        self._to_enter = 0  # chunks
        self._home: Tensor | None = None  # (M, D)

    def depart(self, *parts: Tensor, last_first: bool = False) -> None:
        """Rows in the order of the wire, or their FP8 numbers and scales: (M, D) or (M,) each. Chunks have to enter in
        the order in which they depart, lest one waits for all."""
        travel, self._own = zip(*map(self._sorted, parts), strict=True)
        self._coming = [x.new_empty(len(x), self._ranks, *x.shape[1:]) for x in self._own]
        self._to_enter = self.chunks
        for c in reversed(range(self.chunks)) if last_first else range(self.chunks):
            here = self.experts_of(c)
            coming = [x[here].transpose(0, 1) for x in self._coming]
            own = [(to[-1], x[here]) for to, x in zip(coming, self._own, strict=True)]
            self._boxes[c].start([part[c] for part in travel], [to[:-1] for to in coming], own)

    def experts_of(self, c: int) -> slice:
        """Which of this rank's experts a chunk has."""
        return slice(c * self._experts, (c + 1) * self._experts)

    def own(self, dtype: torch.dtype) -> Tensor:
        """Rows of this rank for its own experts: (c e, R, D). To be asked for before the last chunk enters."""
        x, *scale = self._own
        if not scale:
            return x
        return widen(x.flatten(0, 1), scale[0].flatten(), dtype).view_as(x)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """What holds all rows for this rank's experts when all chunks have entered: (c e, n, R, D)."""
        if self._whole is None:
            x, *scale = self._coming
            self._whole = torch.empty_like(x, dtype=dtype) if scale else x
        return self._whole

    def enter(self, c: int, dtype: torch.dtype) -> Tensor:
        """What departed for this rank's experts of a chunk: (e, n, R, D), its own rows last."""
        self._boxes[c].land()
        here = self.experts_of(c)
        entered = self.whole(dtype)[here]
        x, *scale = (part[here] for part in self._coming)
        if scale:
            widen_into(entered.flatten(0, 2), x.flatten(0, 2), scale[0].flatten())
        self._to_enter -= 1
        if not self._to_enter:
            self._coming, self._own, self._whole = [], [], None
        return entered

    def leave(self, c: int, y: Tensor, own: Tensor | None = None) -> None:
        """y (e, n - 1, R, D) is the others'; own (e, R, D), or None where it goes by `own_home`."""
        travel, at_home = self._sorted(self._at_home(y))
        here = [] if own is None else [(at_home[self.experts_of(c)], own)]
        self._boxes[c].start([y.transpose(0, 1)], [travel[c]], here)

    def own_home(self, like: Tensor) -> Tensor:
        """Where what this rank's experts make of its own rows is to be written: (c e, R, D). like (..., R, D)."""
        return self._sorted(self._at_home(like))[1]

    def home(self) -> Tensor:
        """What left for this rank: (M, D), in the order of the wire."""
        for box in self._boxes:
            box.land()
        home, self._home = self._home, None
        return home

    def _at_home(self, like: Tensor) -> Tensor:
        """like (..., R, D)."""
        if self._home is None:
            rows, width = like.shape[-2:]
            self._home = like.new_empty(self.chunks * self._ranks * self._experts * rows, width)
        return self._home

    def _sorted(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Rows in the order of the wire, (M, ...): those that travel (c, n - 1, e, R, ...), and this rank's own
        (c e, R, ...)."""
        rows = len(part) // (self.chunks * self._ranks * self._experts)
        count = self.chunks * self._experts
        travel, own = part.contiguous().split([count * (self._ranks - 1) * rows, count * rows])
        rest = part.shape[1:]
        return (
            travel.view(self.chunks, self._ranks - 1, self._experts, rows, *rest),
            own.view(count, rows, *rest),
        )


# Each of the four is the gradient of another. What one hands the next has travelled apart from autograd, which is given
# a token of no elements in its place, one a chunk. Autograd runs the last made node first, so backward the last chunk
# enters first.


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way: Way, rows: Tensor, numbers: Tensor | None, scale: Tensor | None) -> tuple[Tensor, ...]:
        ctx.way = way
        way.depart(*((rows,) if numbers is None else (numbers, scale)))
        return tuple(rows.new_empty(0) for _ in range(way.chunks))

    @staticmethod
    def backward(ctx, *_tokens: Tensor):
        return None, ctx.way.home(), None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way: Way, c: int, token: Tensor) -> Tensor:
        ctx.way, ctx.c = way, c
        return way.enter(c, token.dtype).data  # a version of its own: what enters later is no change of it

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.way.leave(ctx.c, grad[:, :-1], grad[:, -1])
        return None, None, grad.new_empty(0)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way: Way, c: int, y: Tensor) -> Tensor:
        ctx.way, ctx.c = way, c
        way.leave(c, y[:, :-1], y[:, -1])
        return y.new_empty(0)

    @staticmethod
    def backward(ctx, token: Tensor):
        return None, None, ctx.way.enter(ctx.c, token.dtype)


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx, way: Way, *_tokens: Tensor) -> Tensor:
        ctx.way = way
        return way.home()

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.way.depart(grad, last_first=True)
        return None, *(grad.new_empty(0) for _ in range(ctx.way.chunks))
