"""Whether someone has asked the run to stop: a signal that was caught, and is acted upon at a step's edge.

Imports nothing heavy: the command listens before it imports torch, so that a signal that comes early is not lost.
"""

import signal
from collections.abc import Callable
from typing import Any

# Ctrl-C, SLURM's end of a job, and what the batch script sends ahead of a time limit
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Catches the signals from `listen` to `close`. After the first, Ctrl-C has its usual meaning."""

    def __init__(self):
        self.signal: str | None = None
        self.tell: Callable[[str], None] = lambda _message: None
        self._before: dict[int, Any] = {}

    def listen(self) -> "StopRequest":
        """From now on."""
        if not self._before:
            self._before = {number: signal.signal(number, self._catch) for number in SIGNALS}
        return self

    def close(self) -> None:
        """As it was before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _catch(self, number: int, _frame: Any) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.tell(f"{self.signal}: a checkpoint follows this step; Ctrl-C again ends at once.")
