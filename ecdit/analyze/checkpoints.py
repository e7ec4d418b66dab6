"""What is in a run's checkpoints: for `ecdit checkpoint`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from ecdit.errors import UserError
from ecdit.run import Run
from parallel.checkpoint.folder import MANIFEST, committed, open_checkpoint, step_of, verify


def listing(run: Run) -> list[dict[str, Any]]:
    """One row a committed checkpoint, oldest first; of one whose files cannot be read, why not under "damaged". Raises
    UserError where the folder is no run."""
    run.recipe()
    return [_row_or_why(folder) for folder in committed(run.checkpoints)]


def _row_or_why(folder: Path) -> dict[str, Any]:
    try:
        return _row(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"step": step_of(folder), "folder": str(folder), "damaged": "; ".join(verify(folder))}


def _row(folder: Path) -> dict[str, Any]:
    meta = open_checkpoint(folder).meta
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {
        "step": step_of(folder),
        "samples": meta["samples"],
        "updates": meta["updates"],
        "bytes": sum(file["bytes"] for file in files.values()),
        "files": len(files),
        "written": int((folder / MANIFEST).stat().st_mtime),
        "folder": str(folder),
    }


def as_table(rows: list[dict[str, Any]]) -> Table:
    """For the terminal."""
    table = Table("step", "samples seen", "MiB", "files", "folder")
    for row in rows:
        if "damaged" in row:
            table.add_row(str(row["step"]), "damaged", "", "", f"{row['folder']}: {row['damaged']}")
            continue
        size = f"{row['bytes'] / 2**20:.1f}"
        table.add_row(str(row["step"]), str(row["samples"]), size, str(row["files"]), row["folder"])
    return table


def verify_all(run: Run, step: int | None) -> Iterator[tuple[str, list[str]]]:
    """(name, what is wrong with it) of each checkpoint, or of one step's. Raises UserError where there is none."""
    run.recipe()
    folders = [folder for folder in committed(run.checkpoints) if step in (None, step_of(folder))]
    if not folders:
        raise UserError(f"{run.checkpoints}: no checkpoint{'' if step is None else f' of step {step}'}")
    for folder in folders:
        yield folder.name, verify(folder)
