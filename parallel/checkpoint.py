"""Checkpoints: written aside, verified, renamed; a folder without a manifest is none.

A checkpoint is `step-N/`: one safetensors file for each kind of state (weights, ema, the optimizer's), whole tensors
in the parameters' own shapes, so that it loads on any number of ranks; `state.json`, what else a run needs to go on;
`manifest.json`, the size and xxh64 of every file. Nothing in it is ever unpickled.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
STATE = "state.json"


class CheckpointError(Exception):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint that has been verified."""

    folder: Path
    step: int
    meta: dict[str, Any]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """kind -> parameter -> tensor, on the CPU."""
        return {path.stem: load_file(path) for path in sorted(self.folder.glob("*.safetensors"))}

    def kind(self, kind: str) -> dict[str, Tensor]:
        """The tensors of one kind, such as ema."""
        return load_file(self.folder / f"{kind}.safetensors")


def save(root: Path, step: int, state: dict[str, dict[str, Tensor]], meta: dict[str, Any], keep_last: int) -> Path:
    """Commits `root/step-N` and then deletes all but the newest `keep_last`. One rank calls this.

    Raises CheckpointError where the file system refuses (a full disk, say): what was written is removed again.
    """
    final, partial = root / f"step-{step}", root / f"step-{step}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for kind, tensors in state.items():
            save_file({name: t.contiguous() for name, t in tensors.items()}, partial / f"{kind}.safetensors")
        (partial / STATE).write_text(json.dumps({"step": step, **meta}, indent=1), encoding="utf-8")
        files = {path.name: _describe(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _sync(path)
        problems = verify(partial)
        if problems:
            raise CheckpointError(f"{final}: does not read back as written: {problems[0]}")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(root)
        _point_latest(root, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{final}: cannot write this checkpoint: {error}{_room(root)}") from None
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in committed(root)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def committed(root: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first."""
    folders = [p for p in root.glob("step-*") if p.suffix == "" and p.name[5:].isdigit() and (p / MANIFEST).exists()]
    return sorted(folders, key=_step)


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files, one sentence each; empty: nothing."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        if path.parent != folder or name in (".", ".."):
            problems.append(f"{MANIFEST} names {name!r}, which is outside the checkpoint")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif (found := _describe(path)) != expected:
            problems.append(f"{name} is damaged: expected {expected}, found {found}")
    missing = [name for name in (STATE, "weights.safetensors") if name not in files]
    return problems + [f"{MANIFEST} lists no {name}" for name in missing]


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a message for each broken one, set aside as `step-N.broken`."""
    messages = []
    for folder in reversed(committed(root)):
        problems = verify(folder)
        if not problems:
            meta = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return Checkpoint(folder, meta["step"], meta), messages
        aside = folder.with_suffix(".broken")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        messages.append(f"{folder} is broken and was set aside as {aside.name}: {'; '.join(problems)}")
    return None, messages


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _describe(path: Path) -> dict[str, Any]:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh64": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_latest(root: Path, folder: Path) -> None:
    aside = root / "latest.partial"
    aside.write_text(folder.name + "\n", encoding="utf-8")
    _sync(aside)
    aside.replace(root / "latest")


def _room(root: Path) -> str:
    try:
        return f" ({shutil.disk_usage(root).free / 2**20:.0f} MiB free in {root})"
    except OSError:
        return ""
