"""The folder of a run's checkpoints, and the commit protocol: written aside, described, renamed.

`step-N.partial/` is being written. `step-N/` is a checkpoint once it has a manifest, which lists the size and xxh64 of
every file; what has none is no checkpoint. `step-N.broken/` did not verify and was set aside. `latest` names the
newest.
"""

import json
import os
import shutil
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor

from parallel.checkpoint import CheckpointError
from parallel.checkpoint.boxes import Boxes
from parallel.checkpoint.storage import INDEX, Loading, Reader, read_index

MANIFEST = "manifest.json"
STATE = "state.json"
Description = dict[str, dict[str, Any]]  # file name -> size and checksum


@dataclass(frozen=True)
class Keep:
    """The newest `last` checkpoints stay, and, unless it is 0, those whose step is a multiple of `every`; and those of
    the steps that `held` returns."""

    last: int
    every: int = 0
    held: Callable[[], Container[int]] = tuple


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint that has been verified. meta: what `state.json` says."""

    folder: Path
    step: int
    meta: dict[str, Any]

    def load(self, state: dict[str, Boxes | Tensor]) -> None:
        """Fills tensors, or this rank's boxes of them, in place, whatever layout they were saved from.

        Raises CheckpointError where the checkpoint has no such tensor.
        """
        try:
            dcp.load(state, storage_reader=Reader(self.folder), planner=Loading(), no_dist=True)
        except dcp.CheckpointException as error:
            raise CheckpointError(f"{self.folder}: {reason_of(error)}") from None

    @property
    def names(self) -> set[str]:
        """Of its tensors."""
        return set(read_index(self.folder))

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Of the whole tensors of one kind, such as ema, by parameter."""
        index = read_index(self.folder).items()
        return {name.removeprefix(f"{kind}/"): tuple(t["shape"]) for name, t in index if name.startswith(f"{kind}/")}

    def kind(self, kind: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Whole tensors of one kind, by parameter: all, or those named."""
        index, wanted = read_index(self.folder), self.shapes(kind) if names is None else names
        state = {
            name: torch.empty(index[name]["shape"], dtype=getattr(torch, index[name]["dtype"]))
            for name in (f"{kind}/{parameter}" for parameter in wanted)
        }
        self.load(state)
        return {name.removeprefix(f"{kind}/"): tensor for name, tensor in state.items()}


def reason_of(error: BaseException) -> str:
    """What a rank's exception said, out of the collection that torch makes of them."""
    failures = getattr(error, "failures", None)
    if not failures:
        return str(error)
    rank, (first, _trace) = sorted(failures.items())[0]
    return f"rank {rank}: {first}" if len(failures) < 2 and rank else str(first)


# ------------------------------------------------------------------------------------------------------------- reading


def committed(root: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first."""
    folders = [p for p in root.glob("step-*") if p.suffix == "" and p.name[5:].isdigit() and (p / MANIFEST).exists()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step in a folder's name."""
    return int(folder.name[5:])


def open_checkpoint(folder: Path) -> Checkpoint:
    """One that has been verified."""
    meta = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(folder, meta["step"], meta)


def verify(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, one sentence each; empty: nothing. Checksums of every parts-th file."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        named = sorted(files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    problems = [f"{MANIFEST} lists no {name}" for name in (STATE, INDEX) if name not in files]
    for number, (name, expected) in enumerate(named):
        path = folder / name
        if path.parent != folder or name in (".", ".."):
            problems.append(f"{MANIFEST} names {name!r}, which is outside the checkpoint")
        elif not path.is_file():
            problems.append(f"{name} is missing")
        elif number % parts == part and (found := describe(path)) != expected:
            problems.append(f"{name} is damaged: expected {expected}, found {found}")
    if not problems:
        try:
            lost = {box["file"] for tensor in read_index(folder).values() for box in tensor["boxes"]} - files.keys()
            problems += [f"{MANIFEST} lists no {name}" for name in sorted(lost)]
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def set_aside(folder: Path, problems: list[str]) -> str:
    """Renames a broken checkpoint; what to tell the user."""
    aside = folder.with_suffix(".broken")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    return f"{folder} is broken and was set aside as {aside.name}: {'; '.join(problems)}"


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, for readers: nothing is renamed. And a message for each broken one."""
    messages = []
    for folder in reversed(committed(root)):
        problems = verify(folder)
        if not problems:
            return open_checkpoint(folder), messages
        messages.append(f"{folder} is broken: {'; '.join(problems)}")
    return None, messages


# ------------------------------------------------------------------------------------------------------------- writing


def describe(path: Path) -> dict[str, Any]:
    """Size and checksum of a file."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh64": digest.hexdigest()}


def commit(root: Path, step: int, files: Description, meta: dict[str, Any], keep: Keep) -> Path:
    """Turns `step-N.partial`, written and described, into `step-N`; then deletes what is not to be kept.

    Raises OSError where the file system refuses.
    """
    partial, final = partial_folder(root, step), root / f"step-{step}"
    (partial / STATE).write_text(json.dumps({"step": step, **meta}, indent=1), encoding="utf-8")
    files = files | {name: describe(partial / name) for name in (STATE, INDEX)}
    (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    for path in (partial / STATE, partial / MANIFEST, partial):
        _sync(path)
    sizes = {name: (partial / name).stat().st_size for name in files}
    wrong = [name for name, size in sizes.items() if size != files[name]["bytes"]]
    if wrong:
        raise OSError(f"{wrong[0]} does not have the size that was written")
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(root)
    _point_latest(root, final)
    held = keep.held()
    for old in committed(root)[: -keep.last]:
        if (not keep.every or step_of(old) % keep.every) and step_of(old) not in held:
            shutil.rmtree(old, ignore_errors=True)
    return final


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written."""
    return root / f"step-{step}.partial"


def clear_partial(root: Path) -> None:
    """Removes what a killed run left half-written."""
    for left in root.glob("step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def room(root: Path) -> str:
    """For messages: what is free."""
    try:
        return f" ({shutil.disk_usage(root).free / 2**20:.0f} MiB free in {root})"
    except OSError:
        return ""


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
