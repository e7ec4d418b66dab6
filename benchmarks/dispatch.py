"""The way of tokens to their experts and back: gather, all-to-all where there are ranks, gate-weighted combine.

Against the rate of a plain copy for what a rank does alone. Under torchrun the all-to-all joins, and the same is timed
with experts that compute, in chunks whose rows travel while another chunk is computed, and not: how much of the way
is hidden is told.

Shapes: `N` tokens of a rank in groups of `T`, `D` hidden, `E` experts of all ranks, `M = 2 N` slots.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.budget import NOTHING, Asked, Step, Variant, compare
from benchmarks.harness import Row, captured, device_here
from benchmarks.peers import GPU, STD, differentiated
from ecdit.model.experts import ExpertsBetween, batched_ffn
from ecdit.model.kernels import slots
from ecdit.model.router import RoutingPlan, expert_choice
from parallel.copy_engines import engines_of
from parallel.dispatch import Exchange
from parallel.topology import Layout, Topology
from parallel.topology import start as start_ranks
from parallel.transport import Collective, Transport

N, T, D, E = (65_536, 1024, 2304, 32) if GPU else (2048, 256, 128, 8)
TYPE = torch.bfloat16 if GPU else torch.float32
FACTOR = 2
CALLS = 10 if GPU else 4  # of what takes little time, in one that is timed
CHUNKS = (1, 2, 4)
SECONDS = 12.0 if GPU else 6.0

Carry = Callable[[int], Transport]  # of a box's number


def rows(asked: Asked = NOTHING) -> list[Row]:
    """Milliseconds are of one way. The trace is of the first variant."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    topology = start_ranks(Layout(expert=ranks), 10.0)
    variants = _alone()
    found = compare(variants, (asked.seconds or SECONDS) / (2 if ranks > 1 else 1), TYPE, asked.trace)
    for row in found:  # a step of these is CALLS ways
        if row.spread is not None:
            row.milliseconds /= CALLS
            row.spread = tuple(taken / CALLS for taken in row.spread)
    return found + (_between(topology, (asked.seconds or SECONDS) / 2) if ranks > 1 else [])


# ------------------------------------------------------------------------------------------------- what a rank does


def _alone() -> list[Variant]:
    tokens, rows = N * D * TYPE.itemsize, FACTOR * N * D * TYPE.itemsize
    kind = str(TYPE).removeprefix("torch.")
    whole, fp8 = f"gather and combine, {kind}", "gather in FP8"
    return [
        _calls(f"{whole}, forward and backward", lambda: _both(backward=True), 5 * tokens + 5 * rows),
        _calls(f"{whole}, forward", lambda: _both(backward=False), 2 * tokens + 2 * rows),
        _calls(f"gather, {kind}, forward", _gather, tokens + rows),
        _calls(f"{fp8}, forward", _gather_fp8, tokens + rows // TYPE.itemsize, against=f"gather, {kind}, forward"),
    ]


def _calls(name: str, make: Callable[[], Step], moved: int, against: str | None = None) -> Variant:
    @contextmanager
    def ready() -> Iterator[Step]:
        yield captured(make(), CALLS)

    return Variant(name, ready, against, moved=float(CALLS * moved))


def _plan(experts: int = E) -> RoutingPlan:
    affinity = torch.randn(N // T, T, experts, device=device_here()).softmax(-1)
    return expert_choice(affinity, FACTOR * T // experts)


def _tokens() -> Tensor:
    return torch.randn(N, D, device=device_here(), dtype=TYPE)


def _both(*, backward: bool) -> Step:
    plan = _plan()
    where, gate, x = plan.slot_map(), plan.gate.detach(), _tokens()

    def way(x: Tensor) -> Tensor:
        return slots.combine(slots.dispatch(x, where), gate, where)

    return differentiated(way, [x], []) if backward else _without_gradient(lambda: way(x))


def _gather() -> Step:
    where, x = _plan().slot_map(), _tokens()
    return _without_gradient(lambda: slots.dispatch(x, where))


def _gather_fp8() -> Step:
    where, x = _plan().slot_map(), _tokens()
    return _without_gradient(lambda: slots.dispatch_fp8(x, where))


def _without_gradient(function: Callable[[], object]) -> Step:
    def step() -> None:
        with torch.no_grad():
            function()

    return step


# ---------------------------------------------------------------------------------------------------- between ranks


def _between(topology: Topology, seconds: float) -> list[Row]:
    """All ranks as one expert-parallel group, whose experts are of the model's own shapes. Where copy engines carry the
    rows, against NCCL."""
    ranks, group = topology.ranks, topology.groups.ep
    engines, _ = engines_of(group, 2 * CHUNKS[-1], topology.device)
    theirs: Carry = lambda _box: Collective(group)  # noqa: E731
    ours = engines.box if engines else theirs
    kind = str(TYPE).removeprefix("torch.")
    alone, travel, crossing = "experts alone", f"gather, all-to-all, combine, {kind}", f"all-to-all alone, {kind}"
    whole, by = f"{travel}, with experts", ", by NCCL" if engines else ""

    def in_chunks(count: int) -> str:
        return f"{whole}, {count} chunks"

    variants = [
        Variant(whole, lambda: _way(topology, 1, ours, compute=True)),
        Variant(travel, lambda: _way(topology, 1, ours, compute=False)),
        Variant(alone, lambda: _experts_alone(ranks)),
        *(Variant(in_chunks(n), lambda n=n: _way(topology, n, ours, compute=True), whole) for n in CHUNKS[1:]),
    ]
    if engines:
        variants += [
            Variant(whole + by, lambda: _way(topology, 1, theirs, compute=True), whole),
            Variant(travel + by, lambda: _way(topology, 1, theirs, compute=False), travel),
            Variant(in_chunks(2) + by, lambda: _way(topology, 2, theirs, compute=True), in_chunks(2)),
            Variant(crossing, lambda: _all_to_all(topology, TYPE, ours)),
        ]
    variants += [
        Variant(crossing + by, lambda: _all_to_all(topology, TYPE, theirs), crossing if by else None),
        Variant(f"all-to-all alone, FP8{by}", lambda: _all_to_all(topology, torch.uint8, theirs), crossing + by),
    ]
    found = {row.name: row for row in compare(variants, seconds, TYPE)}
    for carried in {"", by}:
        _tell_hidden(found, whole, carried, found[travel + carried], found[alone])
    for name, row in found.items():
        if name.startswith("all-to-all alone") and row.milliseconds:
            size = 1 if "FP8" in name else TYPE.itemsize
            row.about["GB/s"] = 1e-6 * FACTOR * N * D * size * (ranks - 1) / ranks / row.milliseconds
    return list(found.values())


def _tell_hidden(rows: dict[str, Row], whole: str, by: str, way: Row, alone: Row) -> None:
    """Of the way's time, the share that the experts' time covers."""
    for name, row in rows.items():
        carried = name.startswith(whole) and ("NCCL" in name) == ("NCCL" in by)
        if carried and None not in (way.milliseconds, alone.milliseconds, row.milliseconds):
            row.about["of the way hidden"] = (
                way.milliseconds + alone.milliseconds - row.milliseconds
            ) / way.milliseconds


def _weights(ranks: int) -> tuple[Tensor, Tensor]:
    """Of this rank's experts, (e, F, D) and (e, D, F)."""
    up = torch.randn(E // ranks, 4 * D, D, device=device_here(), dtype=TYPE) * STD
    down = torch.randn(E // ranks, D, 4 * D, device=device_here(), dtype=TYPE) * STD
    return up.requires_grad_(), down.requires_grad_()


@contextmanager
def _way(topology: Topology, chunks: int, carry: Carry, *, compute: bool) -> Iterator[Step]:
    exchange, plan = Exchange(topology.groups, E, chunks, carry), _plan()
    plan.arrange(exchange.arrange)
    where, gate = plan.slot_map(), plan.gate.detach()
    up, down = _weights(topology.ranks)
    between = partial(ExpertsBetween.apply, up, down) if compute else None

    def way(x: Tensor) -> Tensor:
        rows = exchange(slots.dispatch(x, where), lambda rows, _chunk: rows, between=between)
        return slots.combine(rows, gate, where)

    yield differentiated(way, [_tokens()], [up, down] if compute else [])


@contextmanager
def _experts_alone(ranks: int) -> Iterator[Step]:
    up, down = _weights(ranks)
    rows = torch.randn(E // ranks, FACTOR * N // (E // ranks), D, device=device_here(), dtype=TYPE)
    yield differentiated(lambda x: batched_ffn(x, up, down), [rows], [up, down])


@contextmanager
def _all_to_all(topology: Topology, dtype: torch.dtype, carry: Carry) -> Iterator[Step]:
    """The others' share of the slots' rows, one way. FP8 travels as bytes."""
    ranks, transport = topology.ranks, carry(0)
    rows = torch.ones(ranks - 1, FACTOR * N // ranks, D, device=device_here(), dtype=dtype)
    arriving = torch.empty_like(rows)

    def step() -> None:
        transport.start([rows], [arriving], [])
        transport.land()

    yield step
