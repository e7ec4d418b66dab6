"""One part of a source to shards in a folder of its own, which appears when all of it is written."""

import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ecdit.data.prepare.captions import texts
from ecdit.data.prepare.picture import Unusable, crop
from ecdit.data.prepare.settings import Settings
from ecdit.data.shards import write_shards
from ecdit.data.sources import Fault, Pair, Part

TOGETHER = 32  # pairs that are looked at, and encoded, together
REPORT, COUNTS = "report.jsonl", "part.json"
IMAGE_COLUMNS, TEXT_COLUMNS = (
    {"key": "str", "captions": "json"},
    {"text": "ndarray:uint16", "text_tokens": "ndarray:int32"},
)
LATENT_COLUMNS = {
    "posterior": {"latent_mean": "ndarray:float16", "latent_logvar": "ndarray:float16"},
    "sample": {"latent": "ndarray:float16"},
}


@dataclass
class Ready:
    """A pair that is good: pixels (R, R, 3) uint8, only where they are to be encoded."""

    key: str
    captions: list[str]
    file: bytes
    pixels: np.ndarray | None
    changes: list[str]


@dataclass
class Counts:
    """What became of a part: pairs in the shards, and how many were left out or changed, by reason."""

    pairs: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Counts") -> None:
        """Takes another part's in."""
        self.pairs += other.pairs
        self.left_out.update(other.left_out)
        self.changed.update(other.changed)

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {"pairs": self.pairs, "left_out": dict(self.left_out), "changed": dict(self.changed)}

    @classmethod
    def read(cls, file: Path) -> "Counts":
        """From a part's file."""
        found = json.loads(file.read_text(encoding="utf-8"))
        return cls(found["pairs"], Counter(found["left_out"]), Counter(found["changed"]))


Encode = Callable[[list[Ready]], list[dict[str, Any]]]
Looker = Callable[[Iterable[tuple[Pair | Fault, ...]]], Iterator[list[Ready | Fault]]]


def folder_of(number: int) -> str:
    """Name of the folder of a part's shards."""
    return f"part-{number:06}"


def columns(settings: Settings) -> dict[str, str]:
    """streaming's encodings of the columns that are written."""
    found = dict(IMAGE_COLUMNS)
    if settings.pictures:
        found["image"] = "bytes"
    if settings.latents:
        found |= LATENT_COLUMNS[settings.latents]
    return found | (TEXT_COLUMNS if settings.text_encoder else {})


def look(pairs: Iterable[Pair | Fault], settings: Settings) -> list[Ready | Fault]:
    """What is good among some pairs, cropped, and what is not."""
    return [pair if isinstance(pair, Fault) else _look(pair, settings) for pair in pairs]


def _look(pair: Pair, settings: Settings) -> Ready | Fault:
    key = pair.key.encode("utf-8", "backslashreplace").decode()  # a file's name may be of any bytes
    try:
        captions = texts(pair.captions, lines=settings.columns.lines, clean=settings.clean)
        cropped = crop(pair.picture, key, settings)
    except Unusable as error:
        return Fault(key, error.reason, error.detail)
    return Ready(key, captions, cropped.file, cropped.pixels if settings.latents else None, cropped.changes)


def write_part(
    part: Part,
    number: int,
    work: Path,
    settings: Settings,
    *,
    looker: Looker | None = None,
    encode: Encode | None = None,
    count: Callable[[int], None] = lambda pairs: None,
) -> Counts:
    """Writes the shards of part `number` into the folder `work`. Returns what became of its pairs.

    looker: does `look` for many batches, elsewhere perhaps. encode: adds columns to those of captions and pictures.
    """
    partial = work / f"{folder_of(number)}.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    counts, notes = Counts(), []

    def samples() -> Iterator[dict[str, Any]]:
        good: list[Ready] = []
        batches = batched(part.pairs(), TOGETHER)
        for looked in looker(batches) if looker else (look(batch, settings) for batch in batches):
            good += _sort_out(looked, counts, notes)
            while len(good) >= TOGETHER:
                yield from _as_samples(good[:TOGETHER], settings, encode)
                good = good[TOGETHER:]
            count(len(looked))
        yield from _as_samples(good, settings, encode)

    counts.pairs = write_shards(
        samples(),
        partial,
        columns(settings),
        shard_bytes=settings.shard_mib << 20,
        compression=settings.compression,
    )
    (partial / REPORT).write_text("".join(json.dumps(note) + "\n" for note in notes), encoding="utf-8")
    (partial / COUNTS).write_text(json.dumps(counts.as_dict()), encoding="utf-8")
    _commit(partial, work / folder_of(number))
    return counts


def _sort_out(looked: list[Ready | Fault], counts: Counts, notes: list[dict[str, str]]) -> list[Ready]:
    good = []
    for found in looked:
        if isinstance(found, Fault):
            counts.left_out[found.reason] += 1
            notes.append({"key": found.key, "left_out": found.reason, "detail": found.detail})
            continue
        for change in found.changes:
            counts.changed[change] += 1
            notes.append({"key": found.key, "changed": change})
        good.append(found)
    return good


def _as_samples(good: list[Ready], settings: Settings, encode: Encode | None) -> Iterator[dict[str, Any]]:
    encoded = encode(good) if encode and good else [{} for _ in good]
    for ready, more in zip(good, encoded, strict=True):
        picture = {"image": ready.file} if settings.pictures else {}
        yield {"key": ready.key, "captions": ready.captions} | picture | more


def _commit(partial: Path, folder: Path) -> None:
    """On the disk first, then under its name: what has the name is whole."""
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if folder.exists():  # by a process that outlived its parent
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def ahead(submit: Callable, tasks: Iterable, number: int) -> Iterator:
    """Results of submit(task), in order, with `number` tasks under way."""
    under_way: deque = deque()
    for task in tasks:
        under_way.append(submit(task))
        if len(under_way) >= number:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def batched(items: Iterable, number: int) -> Iterator[tuple]:
    """Tuples of `number` items; the last may be shorter. (Python 3.12 has it in itertools.)"""
    iterator = iter(items)
    while batch := tuple(islice(iterator, number)):
        yield batch
