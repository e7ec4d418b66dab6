"""MDS shards: written whole or not at all, checked before they are read.

A sample has `image` (a PNG or JPEG file), `caption` and `key`, its name; the embedded data set adds `scene`, what is
in the picture. Of streaming's encodings an image may have bytes, png or jpeg.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from ecdit.data.streaming_import import MDSWriter, Reader, reader_from_json
from ecdit.errors import UserError

INDEX = "index.json"
NEEDED = {"image", "caption", "key"}
SHARD_BYTES = 64 << 20
HASHED_AT_START = 2 << 30  # data sets up to this size are hashed whole before the first step


def write_shards(samples: Iterable[dict[str, Any]], out: Path, columns: dict[str, str], extra: dict[str, str]) -> int:
    """Writes samples to a new folder, which appears when all is written. Returns their number.

    columns: streaming's encoding of each column. extra: name -> text of further files in the folder.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with MDSWriter(out=str(partial), columns=columns, hashes=["xxh64"], size_limit=SHARD_BYTES) as writer:
        for sample in samples:
            writer.write(sample)
            count += 1
    for name, text in extra.items():
        (partial / name).write_text(text, encoding="utf-8")
    partial.rename(out)
    return count


def open_shards(folder: Path) -> list[Reader]:
    """Readers of a folder's shards, in order. Raises UserError for what is missing, damaged or of another kind."""
    index = folder / INDEX
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["shards"]
        readers = [reader_from_json(str(folder), None, entry) for entry in entries]
    except FileNotFoundError:
        raise UserError(
            f"data.streams: {folder}: {INDEX} is missing; make shards with `ecdit prepare SOURCE {folder}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"data.streams: {index} cannot be read as an index of MDS shards: {error!r}") from None
    total = sum(entry["raw_data"]["bytes"] for entry in entries)
    for entry in entries:
        _check_shard(folder, entry, hashed=total <= HASHED_AT_START)
    if not readers:
        raise UserError(f"data.streams: {index} lists no shards")
    return readers


def _check_shard(folder: Path, entry: dict[str, Any], *, hashed: bool) -> None:
    missing = NEEDED - set(entry["column_names"])
    if missing:
        raise UserError(
            f"data.streams: {folder}: the shards have no column {sorted(missing)[0]!r}; they have "
            f"{', '.join(entry['column_names'])}; `ecdit prepare` writes what is needed"
        )
    if entry["zip_data"] is not None or "pkl" in entry["column_encodings"]:
        raise UserError(f"data.streams: {folder}: compressed shards and pickled columns are not read")
    path = folder / entry["raw_data"]["basename"]
    remedy = f"copy it again, or make the shards anew with `ecdit prepare SOURCE {folder}` in an empty folder"
    if not path.is_file():
        raise UserError(f"data.streams: {path}: this shard is missing; {remedy}")
    expected = entry["raw_data"]["bytes"]
    if path.stat().st_size != expected:
        raise UserError(
            f"data.streams: {path}: this shard has {path.stat().st_size} bytes, expected {expected}; {remedy}"
        )
    expected = entry["raw_data"]["hashes"].get("xxh64")
    if hashed and expected is not None and (found := _xxh64(path)) != expected:
        raise UserError(f"data.streams: {path}: this shard is damaged (xxh64 {found}, expected {expected}); {remedy}")


def _xxh64(path: Path) -> str:
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
