"""Checkpoints that an evaluation still needs: none of them makes room for newer ones.

`evaluate/step-N/under-way.json` says that the checkpoint of step N is wanted, and who evaluates it.
"""

import json
from pathlib import Path
from typing import Any

from ecdit.run import Run

MARK = "under-way.json"


def place_of(run: Run, step: int | None) -> Path:
    """The folder of what an evaluation writes besides scores; None: one of the newest checkpoint, whichever that is."""
    return run.folder / "evaluate" / ("" if step is None else f"step-{step}")


def hold(run: Run, step: int, by: dict[str, Any] | None = None) -> None:
    """From now on no newer checkpoint displaces that of the step. by: who evaluates it, once that is known."""
    folder = place_of(run, step)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{MARK}.partial"
    aside.write_text(json.dumps(by or {}) + "\n", encoding="utf-8")
    aside.replace(folder / MARK)


def release(run: Run, step: int) -> None:
    """It is wanted no more."""
    (place_of(run, step) / MARK).unlink(missing_ok=True)


def held(run: Run) -> dict[int, dict[str, Any]]:
    """The steps whose checkpoints are wanted, and by whom."""
    found = {}
    for mark in (run.folder / "evaluate").glob(f"step-*/{MARK}"):
        try:
            found[int(mark.parent.name.removeprefix("step-"))] = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return found
