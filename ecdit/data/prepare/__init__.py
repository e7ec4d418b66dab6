"""Any source of image-text pairs to MDS shards, by many processes and ranks, resumable, whole or absent.

A source is cut into parts by itself alone (`ecdit.data.sources`). A process turns a part into shards in a folder of
its own, which appears by a rename; a preparation that was killed goes on with the parts that are not there. So the
shards are the same however many processes there are and however often they were stopped.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ecdit.data.encoded import ENCODED
from ecdit.data.prepare.part import COUNTS, REPORT, Counts, folder_of
from ecdit.data.prepare.settings import Settings
from ecdit.data.prepare.work import Work
from ecdit.data.shapes import stored
from ecdit.data.shards import INDEX, write_shards
from ecdit.data.sources import Part, find_parts
from ecdit.errors import UserError
from parallel.checkpoint import CheckpointError
from parallel.checkpoint.lock import FolderLock
from parallel.crew import Crew

SETTINGS, PLAN = "prepare.json", "plan.json"
SHAPES_AT_ONCE = 1024  # that a process makes before it hands them over
NAMED = 5  # of the pairs that were left out, in the message that nothing is left


def prepare_shapes(out: Path, *, count: int, seed: int, workers: int = 1, crew: Crew | None = None) -> None:
    """Writes the embedded data set. Asked again for what is there already, it does nothing.

    All ranks of `crew` call it; the first does it. Raises UserError for an `out` that holds something else, and while
    another process prepares it.
    """
    crew = crew or Crew()
    settings = {"source": "shapes", "count": count, "seed": seed}
    if crew.once(lambda: _already_there(out, settings)):
        return
    with _alone(out, crew):
        crew.once(lambda: _already_there(out, settings) or _write_shapes(out, settings, workers))


def _write_shapes(out: Path, settings: dict[str, Any], workers: int) -> None:
    begun = _partial(out)
    shutil.rmtree(begun, ignore_errors=True)
    columns = {"image": "bytes", "caption": "str", "key": "str", "scene": "json"}
    with _full_disk_named(begun):
        written = write_shards(_shapes(settings["count"], settings["seed"], workers), begun, columns)
        (begun / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        begun.rename(out)
    _say(f"{written} samples in {out}.")


def _shapes(count: int, seed: int, workers: int) -> Iterator[dict[str, Any]]:
    """The samples in their order, made by so many processes where they are many."""
    parts = [range(first, min(first + SHAPES_AT_ONCE, count)) for first in range(0, count, SHAPES_AT_ONCE)]
    if min(workers, len(parts)) < 2:
        for numbers in parts:
            yield from stored(seed, numbers)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ecdit.data.shapes"])
    with context.Pool(min(workers, len(parts))) as pool:
        for samples in pool.imap(partial(stored, seed), parts):
            yield from samples


def prepare(settings: Settings, out: Path, *, workers: int, crew: Crew | None = None) -> None:
    """Writes the shards of a source to the folder `out`, which is whole or absent; parts lie in OUT.partial till then.

    All ranks of `crew` call it. Asked again for what is there already, it does nothing. Raises UserError for a source
    that is absent, of an unknown kind or without a usable pair, for an `out` that holds something else, and while
    another command prepares it.
    """
    crew, asked = crew or Crew(), settings.as_dict()
    if crew.once(lambda: _already_there(out, asked)):
        return
    parts = find_parts(settings.source, settings.columns, settings.part)
    with _alone(out, crew):
        # another command may have done it while this one looked at the source
        if not crew.once(lambda: _already_there(out, asked)):
            _prepare(parts, settings, out, workers, crew)


def _prepare(parts: list[Part], settings: Settings, out: Path, workers: int, crew: Crew) -> None:
    partial = _partial(out)
    work = Work(parts, partial, settings, workers, crew)  # loads the encoders: nothing is begun if they are not there
    with _full_disk_named(partial):
        crew.once(lambda: _begin(partial, settings, parts))
        work.run()
        crew.meet()
        crew.once(lambda: _end(partial, out, settings, len(parts), work.describe_encoders()))


def _end(partial: Path, out: Path, settings: Settings, parts: int, encoded: str | None) -> None:
    counts = _merge(partial, parts)
    if not counts.pairs:
        _refuse(settings.source, partial, counts)
    _finish(partial, out, settings, counts, encoded)
    _tell(counts, out)


@contextmanager
def _alone(out: Path, crew: Crew) -> Iterator[None]:
    """Keeps other commands out of OUT.partial: each removes what it takes for the leavings of one that was killed."""
    held: list[FolderLock] = []
    crew.once(lambda: held.append(_lock(out)))
    try:
        yield
    finally:
        for lock in held:
            lock.remove()


def _lock(out: Path) -> FolderLock:
    # beside the folder, which is renamed at the end
    try:
        return FolderLock(out.with_name(out.name + ".lock"), "is preparing it; wait, or choose another folder", of=out)
    except CheckpointError as error:
        raise UserError(str(error)) from None


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _already_there(out: Path, settings: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    if not ((out / INDEX).exists() and (out / SETTINGS).exists()):
        raise UserError(f"{out}: holds something else than shards; choose another folder, or remove this one")
    remedy = "choose another folder, or remove this one"
    found = _read(out / SETTINGS, remedy)
    asked = json.loads(json.dumps(settings))
    differs = [key for key in asked if found.get(key) != asked[key]]
    if differs:
        differs = ["source"] if "source" in differs else differs
        told = ", ".join(f"{key} {found.get(key)!r} instead of {asked[key]!r}" for key in differs)
        raise UserError(f"{out}: holds shards with {told}: {remedy}")
    _check_shards(out, remedy)
    _say(f"{out} is there already.")
    return True


def _check_shards(out: Path, remedy: str) -> None:
    """Raises UserError where one that the index names is not there."""
    try:
        shards = [entry["zip_data"] or entry["raw_data"] for entry in _read(out / INDEX, remedy)["shards"]]
        files = [out / shard["basename"] for shard in shards]
    except (KeyError, TypeError):
        raise UserError(f"{out / INDEX}: is no index of MDS shards; {remedy}") from None
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f", and {len(missing) - 1} more of {len(files)}" if missing[1:] else ""
        raise UserError(
            f"{missing[0]}: this shard is missing{more}; copy it again, or remove {out} and prepare it anew"
        )


def _read(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON object. Raises UserError where it is none: the disk was full, or the machine lost its power."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no JSON object; {remedy}")
    return found


def _begin(work: Path, settings: Settings, parts: list[Part]) -> None:
    """Settles what is prepared in the folder. Raises UserError where it was begun for something else."""
    names = "\n".join(f"{part.name} {part.size}" for part in parts)
    digest = hashlib.blake2b(os.fsencode(names), digest_size=16).hexdigest()
    plan = json.loads(json.dumps({"settings": settings.as_dict(), "parts": len(parts), "names": digest}))
    file, done = work / PLAN, sum(not folder.suffix for folder in work.glob("part-*"))
    if not (file.exists() and done):
        work.mkdir(parents=True, exist_ok=True)
        with _written(file) as new:
            new.write_text(json.dumps(plan, indent=1), encoding="utf-8")
        return
    remedy = f"remove {work}, or choose another folder"
    found = _read(file, remedy)
    if found != plan:
        what = (
            "from another state of the source" if found.get("settings") == plan["settings"] else "with other settings"
        )
        raise UserError(f"{work}: holds a preparation that was begun {what}; {remedy}")
    _say(f"Going on in {work}: {done} of {len(parts)} parts are done.")


def _merge(work: Path, parts: int) -> Counts:
    """One index and one report over all parts."""
    folders = [work / folder_of(number) for number in range(parts)]
    total = Counts()
    with _written(work / REPORT) as new, new.open("wb") as report:
        for folder in folders:
            total.add(Counts.read(folder / COUNTS))
            report.write((folder / REPORT).read_bytes())
    shards = [entry for folder in folders for entry in _entries(folder)]
    with _written(work / INDEX) as new:
        new.write_text(json.dumps({"version": 2, "shards": shards}), encoding="utf-8")
    return total


def _entries(folder: Path) -> list[dict[str, Any]]:
    """A part's entries of the index, as seen from the folder above. (streaming's merge_index copies every index to a
    temporary folder and would not be done in one step.)"""
    entries = json.loads((folder / INDEX).read_text(encoding="utf-8"))["shards"]
    for entry in entries:
        for data in (entry["raw_data"], entry["zip_data"]):
            if data is not None:
                data["basename"] = f"{folder.name}/{data['basename']}"
    return entries


def _finish(work: Path, out: Path, settings: Settings, counts: Counts, encoded: str | None) -> None:
    if encoded is not None:
        (work / ENCODED).write_text(encoded, encoding="utf-8")
    found = settings.as_dict() | {"report": counts.as_dict()}
    (work / SETTINGS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    work.rename(out)
    # what only an unfinished preparation needs; killed from here on, it is finished and not as tidy
    for folder in out.glob("part-*"):
        if folder.suffix:  # begun by a process that was killed
            shutil.rmtree(folder)
            continue
        for file in (COUNTS, REPORT, INDEX):
            (folder / file).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
    (out / PLAN).unlink()


def _refuse(source: str, work: Path, counts: Counts) -> None:
    lines = (work / REPORT).read_text(encoding="utf-8").splitlines()
    notes = [json.loads(line) for line in lines[:NAMED]]
    shutil.rmtree(work)
    told = "".join(f"\n  {note['key']}: {note['left_out']} {note['detail']}".rstrip() for note in notes)
    raise UserError(f"{source}: no usable pair in this source; {counts.left_out.total()} were left out{told}")


def _tell(counts: Counts, out: Path) -> None:
    _say(f"{counts.pairs} samples in {out}.")
    for what, found in (("left out", counts.left_out), ("changed", counts.changed)):
        for reason, number in found.most_common():
            _say(f"  {number} {what}: {reason}")
    if counts.left_out or counts.changed:
        _say(f"  which: {out / REPORT}")


@contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    """What is written to a file that is open fails without its name: the folder's is as good."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(folder)
        raise


@contextmanager
def _written(file: Path):
    """A path to write to, which becomes `file` when all is written."""
    new = file.with_name(file.name + ".new")
    yield new
    new.rename(file)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


__all__ = ["Settings", "prepare", "prepare_shapes"]
