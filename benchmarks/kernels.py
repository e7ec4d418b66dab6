"""Each kernel against its twin in plain torch and against the floor: its bytes at the rate of a plain copy.

On a GPU everything timed is a CUDA graph of a few calls, as a training step is one, so the host does not count. On a
CPU, where no kernel runs, the twins alone are timed, on smaller sizes.

Shapes: `N` tokens in groups of `T`, `M = 2 N` slots, `D` hidden, `E` experts, images of `S` tokens, texts of `L`.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.harness import Row, captured, in_turn, median_ratio
from ecdit.model.kernels import adaln, attention, router, slots
from ecdit.model.router import RoutingPlan, expert_choice
from parallel import kernels
from parallel.engine.ema import Ema
from parallel.engine.optimizer import RmspropMomentum, Slice

GPU = torch.cuda.is_available()
DEVICE, TYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
N, WIDTHS, EXPERTS = (65_536, (1152, 2304), (8, 32, 64)) if GPU else (2048, (128,), (8,))
T, S, L, FACTOR = 1024, 256, 120, 2
HEAD, KV = 64, 6  # width of a head; key-value heads
SLICES = [1 << 24] * 16 if GPU else [1 << 16] * 4  # elements of the optimizer's
COPIED = 1 << 29 if GPU else 1 << 22  # bytes of the plain copy
CALLS, ROUNDS = (10, 15) if GPU else (1, 3)


@dataclass
class Case:
    """What is timed, and the bytes that it has to read and write at least."""

    name: str
    call: Callable[[], Any]
    bytes: float


def rows() -> list[Row]:
    """Floor, twin and kernel of each case; the kernel against both. Spreads, as shares of the median, go to standard
    error."""
    found: list[Row] = []
    for case in _cases():
        found += _measure(case)
    return found


def _measure(case: Case) -> list[Row]:
    source = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    functions = {"copy": _ready(lambda: target.copy_(source)), "twin": _ready(case.call, twin=True)}
    if GPU:
        functions["kernel"] = _ready(case.call)
    times = {name: [taken / CALLS for taken in all_calls] for name, all_calls in in_turn(functions, ROUNDS).items()}
    times["floor"] = [taken * case.bytes / (2 * COPIED) for taken in times.pop("copy")]

    def row(name: str, peer: str | None = None) -> Row:
        against = None if peer is None else f"{case.name}: {peer}"
        ratio = None if peer is None else median_ratio(times[name], times[peer])
        return Row(f"{case.name}: {name}", median(times[name]), against, ratio)

    spreads = ", ".join(f"{name} {_spread(taken):.1%}" for name, taken in times.items())
    print(f"{case.name}: spread {spreads}", file=sys.stderr)
    kernel = [row("kernel", "twin"), row("kernel", "floor")] if GPU else []
    return [row("floor"), row("twin", "floor"), *kernel]


def _spread(taken: list[float]) -> float:
    return (max(taken) - min(taken)) / median(taken)


def _ready(call: Callable[[], Any], *, twin: bool = False) -> Callable[[], Any]:
    """CALLS calls of it: on a GPU as a graph."""
    decide = (lambda tensor: False) if twin else kernels.use_triton
    with patch.object(kernels, "use_triton", decide):
        return captured(call, CALLS)


def _cases() -> Iterator[Case]:
    yield _rmsprop()
    for width in WIDTHS:
        yield from _adaln(width)
        for tokens in (S // 2, S):  # half masked, and not
            yield from _attention(width, tokens)
        for experts in EXPERTS:
            yield from _router(width, experts)
            yield from _slots(width, experts)


def _normal(*shape: int, dtype: torch.dtype = TYPE) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def _both(
    name: str, function: Callable[..., Tensor], inputs: list[Tensor], there: float, back: float
) -> Iterator[Case]:
    """Forward alone, and with the backward pass; the bytes of each."""
    inputs = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        slope = torch.randn_like(function(*inputs))

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    yield Case(f"{name}, forward", forward, there)
    yield Case(
        f"{name}, forward and backward", lambda: torch.autograd.grad(function(*inputs), inputs, slope), there + back
    )


def _rmsprop() -> Case:
    masters = [_normal(n, dtype=torch.float32) for n in SLICES]
    slices = [Slice(m, unit, True, weights=m.to(TYPE, copy=True)) for unit, m in enumerate(masters)]
    optimizer = RmspropMomentum(slices, SLICES, weight_decay=0.01)
    average, gradients = Ema(masters, 0.9999), [torch.randn_like(m) for m in masters]
    weights = sum(SLICES)

    def step() -> None:
        optimizer.step(gradients, 1e-4, average)

    # 4 bytes each: g and v read, v written; then g, v, m, p and the average read, the last three written; and the
    # model's weights, in their own type
    return Case(f"update of {weights / 1e6:.1f} M weights", step, (44 + TYPE.itemsize) * weights)


def _adaln(width: int) -> Iterator[Case]:
    rows = N * width * TYPE.itemsize
    inputs = [_normal(N // S, S, width), _normal(N // S, width), _normal(N // S, width)]
    yield from _both(f"AdaLN, D {width}", adaln.modulate, inputs, 2 * rows, 3 * rows)


def _attention(width: int, tokens: int) -> Iterator[Case]:
    """To themselves and to texts half as long as there is room for."""
    images, kv, shared = N // tokens, min(KV, width // HEAD), max(1, width // HEAD // KV)
    rows, head = N * width * TYPE.itemsize, kv * HEAD * TYPE.itemsize
    qkv = _normal(images, tokens, kv, shared + 2, HEAD)
    name = f"D {width}, {tokens} tokens"
    there, back = 2 * rows + 2 * N * head, 4 * rows + 4 * N * head
    yield from _both(f"self-attention, {name}", attention.self_attention, [qkv], there, back)
    mask = torch.arange(L, device=DEVICE).expand(images, 1, 1, L) < L // 2
    inputs = [_normal(images, tokens, kv, shared, HEAD), _normal(images, L, kv, 2, HEAD)]
    there, back = 2 * rows + 2 * images * L * head, 4 * rows + 4 * images * L * head
    yield from _both(f"cross-attention, {name}", lambda *x: attention.cross_attention(*x, mask), inputs, there, back)


def _router(width: int, experts: int) -> Iterator[Case]:
    name = f"D {width}, E {experts}"
    rows, scores, gates = N * width * TYPE.itemsize, 4 * N * experts, 4 * FACTOR * N
    inputs = [_normal(N, width), _normal(width, experts) / width**0.5]
    yield from _both(f"affinities, {name}", router.affinities, inputs, rows + scores, 2 * rows + 2 * scores)
    if width == WIDTHS[0]:  # the choice does not depend on it
        affinity = _normal(N // T, T, experts, dtype=torch.float32).softmax(-1)
        capacity = FACTOR * T // experts
        yield from _both(
            f"choice, E {experts}",
            lambda affinity: router.choose(affinity, capacity)[1],
            [affinity],
            scores + 3 * gates,
            scores + 3 * gates,
        )


def _slots(width: int, experts: int) -> Iterator[Case]:
    name = f"D {width}, E {experts}"
    affinity = _normal(N // T, T, experts, dtype=torch.float32).softmax(-1)
    plan = expert_choice(affinity, FACTOR * T // experts)
    tokens, slot_rows = N * width * TYPE.itemsize, FACTOR * N * width * TYPE.itemsize
    if width == WIDTHS[0]:
        yield Case(
            f"slot map, E {experts}",
            lambda: slots.slot_map(plan.token, None, plan.tokens, plan.experts),
            12 * FACTOR * N + 4 * N,
        )
    x, rows, gate = _normal(N, width), _normal(FACTOR * N, width), plan.gate.detach()
    # each implementation with the map that it makes
    maps = {triton: _slot_map(plan, triton) for triton in (True, False)}

    def dispatch(x: Tensor) -> Tensor:
        return slots.dispatch(x, maps[kernels.use_triton(x)])

    def dispatch_fp8() -> Any:
        return slots.dispatch_fp8(x, maps[kernels.use_triton(x)])

    def combine(rows: Tensor, gate: Tensor) -> Tensor:
        return slots.combine(rows, gate, maps[kernels.use_triton(rows)])

    there = tokens + slot_rows
    yield from _both(f"dispatch, {name}", dispatch, [x], there, there)
    yield Case(f"FP8 dispatch, {name}", dispatch_fp8, tokens + slot_rows / TYPE.itemsize)
    yield from _both(f"combine, {name}", combine, [rows, gate], there, tokens + 2 * slot_rows)


def _slot_map(plan: RoutingPlan, triton: bool) -> slots.SlotMap:
    with patch.object(kernels, "use_triton", lambda tensor: triton and GPU):
        return slots.slot_map(plan.token, None, plan.tokens, plan.experts)
