"""A step that hangs ends the process, after every rank has written where it stood.

A hang is seen by every rank, for they wait for each other. Each writes the stacks of all its threads, by a timer of
the interpreter's that works even while something holds its lock, and what its collectives were doing (torch's flight
recorder); then the run ends as by any failure.
"""

import faulthandler
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch._C._distributed_c10d as c10d

GRACE = 3.0  # seconds in which the other ranks write theirs
REMEMBERED, NEEDED = 50, 3  # steps that the median is of: at most, at least
RECORDED_COLLECTIVES = "2000"


def record_collectives() -> None:
    """Has torch's flight recorder on. To be called before the first group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", RECORDED_COLLECTIVES)


class Watchdog:
    """Watches the steps of one rank. `on_hang(message)` has to end the process."""

    def __init__(self, stem: Path, *, times_median: float, seconds: float, on_hang: Callable[[str], None]):
        """Writes `stem`.stacks and `stem`.flight.json when a step takes longer than `times_median` times the median
        and than `seconds`."""
        self._stem, self._times, self._least, self._on_hang = stem, times_median, seconds, on_hang
        stem.parent.mkdir(parents=True, exist_ok=True)
        self._file = stem.with_suffix(".stacks").open("a")  # what an earlier start of the run left stays
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._deadline: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @property
    def limit(self) -> float:
        """Seconds that the next step may take."""
        if len(self._seconds) < NEEDED:
            return 2 * self._least
        return max(self._least, self._times * median(self._seconds))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step."""
        began, limit = time.monotonic(), self.limit
        self._deadline = began + limit
        faulthandler.dump_traceback_later(limit, file=self._file)
        try:
            yield
        finally:
            self._deadline = None
            faulthandler.cancel_dump_traceback_later()
        self._seconds.append(time.monotonic() - began)

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()
        self._file.close()
        if not os.path.getsize(self._file.name):
            os.unlink(self._file.name)

    def _watch(self) -> None:
        while not self._closed.wait(0.2):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end(self.limit)
                return

    def _end(self, limit: float) -> None:
        recorded = write_flight_record(self._stem.with_suffix(".flight.json"))
        time.sleep(GRACE)
        also = " and *.flight.json" if recorded else ""
        self._on_hang(
            f"no step for {limit:.0f} s, and so a hang; where each rank stood is in {self._stem.parent}/*.stacks{also}"
        )


def write_flight_record(path: Path) -> bool:
    """Writes what the last collectives of this rank were and whether they ended. False where torch has no record."""
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(c10d, name, None)
        if dump is not None:
            path.write_bytes(dump())
            return True
    return False
