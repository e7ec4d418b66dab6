"""`runs/NAME/status.json`: where a run stands, for people, for the job that supervises it and for `ecdit launch`.

| state | means |
|---|---|
| pending | submitted, not started |
| running | trains, or is about to |
| requeue | stopped with a checkpoint and wants to go on |
| requeued | waits for its next start |
| finished | all steps are done |
| failed | will not go on by itself; `kind` and `why` tell |
| cancelled | someone ended the job |
"""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from ecdit.errors import UserError
from parallel.errors import Ended

NAME = "status.json"
SUPERVISED = "ECDIT_SUPERVISED"  # set where `ecdit supervise` has started the command, and reads how it ended
SECONDS_BETWEEN_UPDATES = 5.0
# kinds of failures
BAD_INPUT, OUT_OF_MEMORY, NOT_FINITE, HANG, LOCKED, CRASH = (
    "bad input", "out of memory", "not finite", "hang", "locked", "crash",
)  # fmt: skip


class RunLocked(UserError):
    """Another process trains in this folder: perhaps one whose node has gone, which its file system has yet to see."""


def read_status(run: Path) -> dict[str, Any]:
    """What the file says; empty where there is none that can be read."""
    try:
        return json.loads((run / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def update_status(run: Path, **changes: Any) -> None:
    """Changes some entries; the file is whole at every moment. A disk that refuses does not end the run."""
    aside = run / f".{NAME}.{socket.gethostname()}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        text = json.dumps(read_status(run) | changes | {"updated": time.time()}, indent=1)
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(run / NAME)
    except OSError:
        return


def kind_of(error: BaseException) -> str:
    """What kind of failure an exception is."""
    if isinstance(error, RunLocked):
        return LOCKED
    if isinstance(error, UserError):
        return BAD_INPUT
    if isinstance(error, Ended):
        return HANG
    # torch's own exception, and what libraries say who raise another
    memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
    return OUT_OF_MEMORY if memory else CRASH


def fail(run: Path, kind: str, why: str, **where: Any) -> None:
    """The command ends without having done its work. Where it is supervised, the supervisor says what follows."""
    end = {} if SUPERVISED in os.environ else {"state": "failed"}
    update_status(run, kind=kind, why=why, failure={"kind": kind, "why": why, **where}, **end)


def record_failure(run: Path, rank: int, error: BaseException) -> None:
    """The command ends by an exception of a rank."""
    plain = isinstance(error, UserError | Ended)
    why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
    fail(run, kind_of(error), why if plain else f"{type(error).__name__}: {why}", rank=rank, host=socket.gethostname())
