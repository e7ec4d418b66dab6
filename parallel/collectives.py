"""The time that a step spends in collectives, as torch's profiler sees it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

# names of gloo's work and of NCCL's kernels; NCCL does an all-to-all, and a pipeline's sends, by SendRecv
KINDS = {
    "all-reduce": r"gloo:all_?reduce|nccl.*AllReduce",
    "all-gather": r"gloo:all_?gather|nccl.*AllGather",
    "reduce-scatter": r"gloo:reduce_?scatter|nccl.*ReduceScatter",
    "all-to-all": r"gloo:all_?to_?all|nccl.*SendRecv",
    "send": r"gloo:(send|recv)",
    "broadcast": r"gloo:broadcast|nccl.*Broadcast",
}


@dataclass
class Measured:
    """Calls and seconds by kind of collective. What overlaps with computing counts in full."""

    calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def kind_of(name: str) -> str | None:
    """The kind of collective that a profiler's event is, None for other events."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), None)


@contextmanager
def measured() -> Iterator[Measured]:
    """Fills what it yields when the context ends. What is profiled takes longer than it would."""
    found = Measured()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        yield found
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    for event in profiler.events():
        kind = kind_of(event.name)
        if kind is not None:
            found.calls[kind] = found.calls.get(kind, 0) + 1
            found.seconds[kind] = found.seconds.get(kind, 0.0) + event.time_range.elapsed_us() / 1e6
