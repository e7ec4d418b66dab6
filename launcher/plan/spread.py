"""A model spread over ranks that do not exist: the shapes and the activations of a real rank, on the meta device.

Every collective is replaced by one that allocates what the real one would and notes what it would send. So the model
that is planned is the model that is trained, and a change of one is a change of the other.

Shapes: as in `parallel.spread`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.dispatch import Exchange
from parallel.layers import Linear, PlainLinears
from parallel.parameters import Split
from parallel.spread import LocalExchange, Spread
from parallel.topology import Layout
from parallel.transport import Copy


@dataclass(frozen=True)
class Sent:
    """One collective of one rank: bytes that it sends to others of its group."""

    kind: str
    axis: str
    size: int
    bytes: float


Note = Callable[[Sent], None]


@dataclass(frozen=True)
class Place:
    """A rank of a layout: its pipeline stage; it is the first of every other group."""

    layout: Layout
    ranks: int
    stage: int = 0

    @property
    def data_ranks(self) -> int:
        """Slices of the global batch."""
        return self.ranks // (self.layout.tensor * self.layout.pipeline)

    @property
    def expert_data_ranks(self) -> int:
        """Ranks that have the same experts."""
        return self.ranks // (self.layout.expert * self.layout.expert_tensor * self.layout.pipeline)


class _Collective(torch.autograd.Function):
    """Makes one tensor from another by `there`, and a gradient of the first's shape by `back`."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad), None, None


class Wire:
    """The collectives of one group, of which this is the first rank."""

    def __init__(self, axis: str, size: int, note: Note):
        self.axis, self.size, self._note = axis, size, note

    def _send(self, kind: str, size: float) -> None:
        if self.size > 1:
            self._note(Sent(kind, self.axis, self.size, size))

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Everyone's part, along a dimension."""
        self._send("all-gather", _bytes(x) * (self.size - 1))
        shape = list(x.shape)
        shape[dim] *= self.size
        return x.new_empty(shape)

    def scatter_sum(self, x: Tensor) -> Tensor:
        """The sum's part of this rank, along dim 0."""
        self._send("reduce-scatter", _bytes(x) * (self.size - 1) / self.size)
        return x.new_empty(x.shape[0] // self.size, *x.shape[1:])

    def sum(self, x: Tensor) -> Tensor:
        """The sum, in place."""
        self._send("all-reduce", 2 * _bytes(x) * (self.size - 1) / self.size)
        return x

    def trade(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An all-to-all of equal parts."""
        self._send("all-to-all", _bytes(x) * (self.size - 1) / self.size)
        return x.new_empty(shape)

    def part(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of what all have: nothing travels."""
        return x.chunk(self.size, dim=dim)[0].contiguous()


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


class PlannedLinears:
    """Column- and row-parallel linears, as megatron-core's compute them."""

    def __init__(self, wire: Wire, sequence: bool):
        self._wire, self._sequence = wire, sequence

    def column(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        return _Column(fan_in, fan_out // self._wire.size, self._wire, self._sequence)

    def row(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        return _Row(fan_in // self._wire.size, fan_out, self._wire, self._sequence)


class _Column(Linear):
    def __init__(self, fan_in: int, fan_out: int, wire: Wire, sequence: bool):
        super().__init__(fan_in, fan_out)
        self._wire, self._sequence = wire, sequence

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnProduct.apply(x, self.weight, self._wire, self._sequence)


class _ColumnProduct(torch.autograd.Function):
    """Keeps this rank's input alone and gathers it once more for the weight's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, wire: Wire, sequence: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wire, ctx.sequence = wire, sequence
        return F.linear(wire.gather(x) if sequence else x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        everyones = ctx.wire.gather(x) if ctx.sequence else x
        grad_x = grad @ weight
        grad_x = ctx.wire.scatter_sum(grad_x) if ctx.sequence else ctx.wire.sum(grad_x)
        return grad_x, grad.flatten(0, -2).mT @ everyones.flatten(0, -2), None, None


class _Row(Linear):
    def __init__(self, fan_in: int, fan_out: int, wire: Wire, sequence: bool):
        super().__init__(fan_in, fan_out)
        self._wire, self._sequence = wire, sequence

    def forward(self, x: Tensor) -> Tensor:
        wire, y = self._wire, F.linear(x, self.weight)  # a library's, which returns its gradient
        if self._sequence:
            return _Collective.apply(y, wire.scatter_sum, wire.gather)
        return _Collective.apply(y, wire.sum, lambda grad: grad)


class _PlannedTransport:
    """An all-to-all that goes nowhere."""

    def __init__(self, wire: Wire):
        self._wire, self._copies = wire, []

    def start(self, parts: list[Tensor], into: list[Tensor], here: list[Copy]) -> None:
        for part in parts:
            self._wire._send("all-to-all", _bytes(part))
        self._copies = [*zip(into, parts, strict=True), *here]

    def land(self) -> None:
        for to, rows in self._copies:
            to.copy_(rows)
        self._copies = []


class _PlannedExchange(Exchange):
    """The real exchange, whose rows go nowhere."""

    def __init__(self, layout: Layout, experts: int, chunks: int, note: Note):
        self.chunks, self.ranks, self._me = chunks, layout.expert, 0
        self.experts = experts // self.ranks // chunks
        self._span = max(1, min(layout.tensor // layout.expert_tensor, layout.expert))
        self._split = layout.expert_tensor > 1
        self._tensor_wire = Wire("expert-tensor", layout.expert_tensor, note)
        wire = Wire("expert", layout.expert, note)
        self.transport = lambda _box: _PlannedTransport(wire)

    def _over_expert_tensor(self, x: Tensor, experts, chunk: int) -> Tensor:
        wire = self._tensor_wire
        if wire.size == 1:
            return experts(x, chunk)
        rows = x.shape[1]
        everyone = _Collective.apply(x.transpose(0, 1).contiguous(), wire.gather, wire.scatter_sum)
        y = experts(everyone.transpose(0, 1).contiguous(), chunk).transpose(0, 1).contiguous()
        y = _Collective.apply(y, wire.scatter_sum, wire.gather)
        return y.view(rows, *x.shape[::2]).transpose(0, 1).contiguous()


class PlannedSpread(Spread):
    """One rank's part of a model, for a layout."""

    def __init__(
        self,
        place: Place,
        note: Note,
        *,
        layers: int | None = None,
        dispatch_chunks: int = 1,
        dispatch_fp8: bool = False,
    ):
        """`layers`: of this stage; None: as the layout divides them."""
        layout = place.layout
        self.dispatch_fp8 = dispatch_fp8
        self._place, self._layers, self._chunks, self._note = place, layers, dispatch_chunks, note
        self.tensor_ranks = layout.tensor
        self.sequence = layout.sequence and layout.tensor > 1
        self.first_stage, self.last_stage = place.stage == 0, place.stage == layout.pipeline - 1
        self._wire = Wire("tensor", layout.tensor, note)
        self.linears = PlannedLinears(self._wire, self.sequence) if layout.tensor > 1 else PlainLinears()

    def layers(self, count: int) -> range:
        stage, stages = self._place.stage, self._place.layout.pipeline
        first, end = stage * count // stages, (stage + 1) * count // stages
        return range(first, end if self._layers is None else first + self._layers)

    def expert_splits(self, hidden_dim: int) -> tuple[Split, ...]:
        layout = self._place.layout
        return Split(0, 0, layout.expert), Split(hidden_dim, 0, layout.expert_tensor)

    def exchange(self, experts: int) -> LocalExchange | Exchange:
        layout = self._place.layout
        if layout.expert == layout.expert_tensor == 1:
            return LocalExchange(experts)
        return _PlannedExchange(layout, experts, self._chunks, self._note)

    def own(self, x: Tensor) -> Tensor:
        return x.chunk(self.tensor_ranks)[0] if self.sequence else x

    def conditioning(self, x: Tensor) -> Tensor:
        if self.tensor_ranks == 1:
            return x
        if self.sequence:
            return _Collective.apply(x, self._wire.gather, self._wire.scatter_sum)
        return _Collective.apply(x, lambda x: x.view_as(x), self._wire.sum)

    def features(self, x: Tensor) -> Tensor:
        wire, n = self._wire, self.tensor_ranks
        if n == 1:
            return x
        if self.sequence:
            here, there = tuple(x.shape), (x.shape[0] // n, *x.shape[1:-1], x.shape[-1] * n)
            return _Collective.apply(x, lambda x: wire.trade(x, there), lambda grad: wire.trade(grad, here))
        return _Collective.apply(x, lambda x: wire.gather(x, -1), lambda grad: wire.part(grad, -1))

    def collect(self, x: Tensor) -> Tensor:
        return self._gather(x) if self.sequence else x

    def own_tokens(self, x: Tensor) -> Tensor:
        if self.sequence or self.tensor_ranks == 1:
            return x
        return _Collective.apply(x, self._wire.part, self._wire.gather)

    def collect_tokens(self, x: Tensor) -> Tensor:
        return x if self.sequence or self.tensor_ranks == 1 else self._gather(x)

    def gather_scores(self, scores: Tensor) -> Tensor:
        return _Collective.apply(scores, self._wire.gather, self._wire.scatter_sum)

    def _gather(self, x: Tensor) -> Tensor:
        return _Collective.apply(x, self._wire.gather, self._wire.part)
