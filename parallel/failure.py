"""One rank fails, all end: at once, and with the message of the rank that failed first.

A rank whose peer has gone waits in a collective until its time-out, or fails with an error about the connection that
tells nothing. So the first to fail says so in the job's store before it leaves, and every rank has a thread that looks
there and ends the process.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

import torch.distributed as dist

from parallel.errors import Ended
from parallel.topology import Topology

SECONDS_BETWEEN_LOOKS = 1.0
KEY = "failure"

Explain = Callable[[BaseException], tuple[str, int] | None]
Report = Callable[[int, BaseException], None]


@contextmanager
def together(
    topology: Topology, log_file: Path, explain: Explain, report: Report
) -> Iterator[Callable[[str], NoReturn]]:
    """Within it, an exception on one rank ends the processes of all; nothing is raised.

    The first rank has the terminal; the output of each other rank goes to its own `log_file`. The first to fail writes
    its message to the terminal too, and calls `report` with its rank and the error. `explain`: message and exit code
    of errors that need no traceback; None for others, which are crashes: exit code 1. A job of one rank is left alone:
    there, after the report, the exception goes on.

    Yields what any thread may call to end all processes with a message.
    """
    if topology.ranks == 1:
        try:
            yield lambda message: _end_alone(message, report)
        except BaseException as error:
            report(0, error)
            raise
        return
    terminal = sys.stderr if topology.first else _redirect(log_file)
    if not topology.first:
        print(topology, flush=True)
    done = threading.Event()
    threading.Thread(target=_look, args=(topology.store.clone(), done), daemon=True).start()

    def end(error: BaseException, message: str, code: int) -> NoReturn:
        done.set()
        _fail(topology, terminal, message, code, lambda: report(topology.rank, error))

    try:
        yield lambda message: end(Ended(message), message, 1)
    except BaseException as error:
        end(error, *(explain(error) or (traceback.format_exc(), 1)))
    finally:
        done.set()


def _end_alone(message: str, report: Report) -> NoReturn:
    report(0, Ended(message))
    print(f"ecdit: {message}", file=sys.stderr)
    _leave("1")


def _redirect(path: Path) -> TextIO:
    """Sends all output of this process, libraries' included, to a file; returns where it went before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(2), "w")
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return terminal


def _fail(topology: Topology, terminal: TextIO, message: str, code: int, report: Callable[[], None]) -> NoReturn:
    own = f"{code} rank {topology.rank}: {message}"
    # in the store before this process goes, so that no rank takes the broken connection for the cause
    first = topology.store.compare_set(KEY, "", own).decode()
    if first == own:
        report()
        print(f"ecdit: rank {topology.rank}: {message}", file=terminal, flush=True)
    if not topology.first:  # its own log
        print(message if first == own else f"{message}\nends because of: {first}")
    _leave(first)


def _look(store: dist.Store, done: threading.Event) -> None:
    while not done.wait(SECONDS_BETWEEN_LOOKS):
        try:
            if store.check([KEY]):
                _leave(store.get(KEY).decode())
        except RuntimeError:  # the store went with its rank, and that rank with its reason
            _leave("1")


def _leave(failure: str) -> NoReturn:
    """Ends the process with the failure's code, without the clean-up that would wait for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(failure.split(" ", 1)[0]))
