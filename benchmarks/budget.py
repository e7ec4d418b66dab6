"""Times variants of one thing in turn for so many seconds, beside what the device can do at most.

A variant that cannot be built or run is told, with why, and the others go on. The yardsticks, a large product of
matrices and a large copy, are timed in the same rounds, so that a share of the peak is of the same minutes.
Under torchrun all ranks time the same rounds, and the slowest rank's time counts.
"""

import gc
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Row, captured, device_here, median_ratio, milliseconds
from ecdit.errors import UserError
from parallel.graph import own_stream

LEAST_ROUNDS, MOST_ROUNDS = 3, 200
PROFILED_STEPS = 3
PRODUCT, COPY = "product of matrices", "copy"  # the yardsticks
SIDE = {"cuda": 8192, "cpu": 1536}  # of the product's square matrices
COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes

Step = Callable[[], Any]
Ready = Callable[[], AbstractContextManager[Step]]


@dataclass
class Variant:
    """One way to do the thing. `ready` builds it, yields a step of it, and takes it down.

    against: name of the variant that its ratio is to. flops: operations of a step, and moved: bytes read and written,
    at least. images: that a step works on. warm_up: calls before those that are timed. graph: whether a GPU replays a
    step as one CUDA graph, as training does with `train.graph`, so that the host does not count. about: what else is to
    be told of it.
    """

    name: str
    ready: Ready
    against: str | None = None
    flops: float = 0.0
    moved: float = 0.0
    images: int = 0
    warm_up: int = 4 if torch.cuda.is_available() else 1
    graph: bool = False
    about: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """What the command line asks of a benchmark; None: the benchmark's own choice.

    seconds: of timing, all in all. steps: of the solver in sampling. trace: where the profile of the first variant
    goes. recipe, overrides: what the step trains. only: patterns, as a shell's for files, of the variants' names.
    """

    seconds: float | None = None
    steps: int | None = None
    trace: Path | None = None
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises UserError for a trace that cannot be written."""
        if self.trace is not None:
            check_place("--profile", self.trace)

    def pick(self, variants: list[Variant]) -> list[Variant]:
        """Those that are asked for. Raises UserError for a pattern that none has a name like."""
        for pattern in self.only:
            if not any(fnmatchcase(variant.name, pattern) for variant in variants):
                names = "; ".join(variant.name for variant in variants)
                raise UserError(f"--only: {pattern!r} is like none of what is measured: {names}")
        return [v for v in variants if not self.only or any(fnmatchcase(v.name, pattern) for pattern in self.only)]


def check_place(option: str, file: Path) -> None:
    """Raises UserError for a file that cannot be written."""
    if not file.parent.is_dir():
        raise UserError(f"{option}: {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise UserError(f"{option}: {file}: is a folder; valid: the name of a file, such as {file}/NAME")


NOTHING = Asked()


@dataclass
class _Found:
    """Milliseconds of each round, or why there are none; and of each yardstick in the same rounds, the best."""

    taken: list[float]
    failed: str | None
    best: dict[str, float]


def compare(variants: list[Variant], seconds: float, dtype: torch.dtype, trace: Path | None = None) -> list[Row]:
    """All of them built, then timed in turn; a ratio is the median of the ratios within a round."""
    found = _measure(variants, seconds, dtype, trace)
    return _rows(variants, found, dtype, median_ratio)


def compare_apart(variants: list[Variant], seconds: float, dtype: torch.dtype, trace: Path | None = None) -> list[Row]:
    """One after the other, each with its share of the time: for what does not fit into memory together. A ratio is that
    of the medians."""
    found: dict[str, _Found] = {}
    for number, variant in enumerate(variants):
        found |= _measure([variant], seconds / len(variants), dtype, trace if number == 0 else None)
    return _rows(variants, found, dtype, lambda ours, theirs: median(ours) / median(theirs))


def _measure(variants: list[Variant], seconds: float, dtype: torch.dtype, trace: Path | None) -> dict[str, _Found]:
    device = device_here()
    with own_stream(device):
        yardsticks = _yardsticks(variants, device, dtype)
        running: dict[str, tuple[Step, ExitStack]] = {}
        failed: dict[str, str] = {}
        for variant in variants:
            _say(f"{variant.name}: building")
            built = _built(variant)
            if isinstance(built, str):
                failed[variant.name] = built
            else:
                running[variant.name] = built
        try:
            times = _rounds(running, yardsticks, failed, seconds)
            if trace is not None:
                _write_trace(running, variants[0].name, failed, trace)
        finally:
            while running:
                running.popitem()[1][1].close()
    best = {name: min(times[name]) for name in yardsticks if name in times}
    return {v.name: _Found(times.get(v.name, []), failed.get(v.name), best) for v in variants}


def _built(variant: Variant) -> tuple[Step, ExitStack] | str:
    """Its step, warm, and what takes it down; or why there is none."""
    _clean()
    opened = ExitStack()

    def build() -> Step:
        step = opened.enter_context(variant.ready())
        step = captured(step, 1) if variant.graph else step
        for _ in range(variant.warm_up):
            milliseconds(step)
        return step

    step, why = _attempt(build)
    if why is None:
        return step, opened
    _attempt(opened.close)
    return why


def _rounds(
    running: dict[str, tuple[Step, ExitStack]], yardsticks: dict[str, Step], failed: dict[str, str], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds by name. What fails on the way is moved from `running` to `failed`."""
    times: dict[str, list[float]] = {name: [] for name in [*yardsticks, *running]}
    began, rounds = time.perf_counter(), 0
    while running and rounds < MOST_ROUNDS:
        for name, step in yardsticks.items():
            times[name].append(milliseconds(step))
        for name in list(running):
            taken, why = _attempt(lambda name=name: milliseconds(running[name][0]))
            if why is None:
                times[name].append(taken)
            else:
                failed[name] = why
                _attempt(running.pop(name)[1].close)
                _clean()
        rounds += 1
        if not _everyone(rounds < LEAST_ROUNDS or time.perf_counter() - began < seconds):
            break
    return {name: _slowest(taken) for name, taken in times.items() if taken and name not in failed}


def _attempt(function: Callable[[], Any]) -> tuple[Any, str | None]:
    """What it returns, or the first line of why it cannot. What it held can then be freed: no traceback is kept.

    Of several ranks one may fail alone, and the others would wait for it: what not all refuse ends the job."""
    try:
        return function(), None
    except UserError as error:
        return None, " ".join(str(error).split())
    except Exception as error:  # libraries' errors are of many kinds; a variant's failure is a finding
        if _several_ranks():
            raise
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _clean() -> None:
    """Frees what nobody holds any more."""
    gc.collect()  # engines' hooks and buffers refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------- the device


def _yardsticks(variants: list[Variant], device: torch.device, dtype: torch.dtype) -> dict[str, Step]:
    """Those that the variants ask for."""
    found: dict[str, Step] = {}
    if any(variant.flops for variant in variants):
        side = SIDE[device.type]
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = torch.empty_like(a)
        found[PRODUCT] = lambda: torch.mm(a, b, out=product)
    if any(variant.moved for variant in variants):
        source = torch.empty(COPIED[device.type], device=device, dtype=torch.uint8).random_()
        target = torch.empty_like(source)
        found[COPY] = lambda: target.copy_(source)
    for step in found.values():
        for _ in range(3):
            milliseconds(step)
    return found


def _work(device: torch.device) -> dict[str, float]:
    """Of the yardsticks: operations, and bytes read and written."""
    return {PRODUCT: 2.0 * SIDE[device.type] ** 3, COPY: 2.0 * COPIED[device.type]}


def _everyone(more: bool) -> bool:
    """Whether all ranks say so."""
    if not _several_ranks():
        return more
    agreed = torch.tensor(int(more), device=device_here())
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)


def _slowest(taken: list[float]) -> list[float]:
    """Of each round, over the ranks."""
    if not _several_ranks():
        return taken
    times = torch.tensor(taken, device=device_here(), dtype=torch.float64)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times.tolist()


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _say(message: str) -> None:
    if not _several_ranks() or dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- rows


def _rows(
    variants: list[Variant],
    found: dict[str, _Found],
    dtype: torch.dtype,
    ratio: Callable[[list[float], list[float]], float],
) -> list[Row]:
    work, rows = _work(device_here()), []
    for name, unit, scale in ((PRODUCT, "TFLOP/s", 1e-9), (COPY, "GB/s", 1e-6)):
        best = [one.best[name] for one in found.values() if name in one.best]
        if best:
            kind = str(dtype).removeprefix("torch.")
            rows.append(Row(f"{name}, {kind}, the best", min(best), about={unit: scale * work[name] / min(best)}))
    for variant in variants:
        one, peer = found[variant.name], found.get(variant.against)
        against = None if peer is None else variant.against
        if one.failed is not None:
            rows.append(Row(variant.name, None, against, failed=one.failed, about=variant.about))
            continue
        row = Row(variant.name, median(one.taken), against, spread=_spread(one.taken))
        if peer is not None and peer.failed is None:
            row.ratio = ratio(one.taken, peer.taken)
        row.about = _rates(variant, row.milliseconds, one.best, work) | variant.about
        rows.append(row)
    return rows


def _spread(taken: list[float]) -> tuple[float, float]:
    low, high = np.percentile(taken, [10, 90])
    return float(low), float(high)


def _rates(variant: Variant, taken: float, best: dict[str, float], work: dict[str, float]) -> dict[str, float]:
    """taken: milliseconds of a step."""
    rates: dict[str, float] = {}
    if variant.flops:
        rates["TFLOP/s"] = 1e-9 * variant.flops / taken
        rates["of the product's rate"] = variant.flops / taken / (work[PRODUCT] / best[PRODUCT])
    if variant.moved:
        rates["GB/s"] = 1e-6 * variant.moved / taken
        rates["of the copy's rate"] = variant.moved / taken / (work[COPY] / best[COPY])
    if variant.images:
        rates["images/s"] = 1e3 * variant.images / taken
    return rates


# ---------------------------------------------------------------------------------------------------------- profile


def _write_trace(running: dict[str, tuple[Step, ExitStack]], name: str, failed: dict[str, str], trace: Path) -> None:
    """A Chrome trace of a few steps of the variant: open it at chrome://tracing or ui.perfetto.dev."""
    if name not in running:
        _say(f"--profile: {name} failed ({failed[name]}); there is no trace")
        return
    step = running[name][0]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as seen:
        for _ in range(PROFILED_STEPS):
            milliseconds(step)
    if not _several_ranks() or dist.get_rank() == 0:
        seen.export_chrome_trace(str(trace))
        _say(f"{trace}: {PROFILED_STEPS} steps of {name}")
