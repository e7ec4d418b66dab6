"""Shards that are elsewhere, or compressed: fetched once a node, checked, unpacked, and removed when room is needed.

Every process of a node uses the same folder. A file lock a shard keeps them from fetching it twice; a killed process
leaves no lock behind, and at most a file that the next one overwrites.
"""

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ecdit.data.remote import Unreachable, download
from ecdit.data.streaming_import import decompress, get_hash
from ecdit.errors import UserError

SECONDS_BETWEEN_TOUCHES = 10.0
DAMAGED = ".damaged"


def default_folder() -> Path:
    """In the folder for temporary files, which clusters keep on the node's own disk."""
    return Path(tempfile.gettempdir()) / f"ecdit-shards-{os.getuid()}"


@dataclass(frozen=True)
class CacheSettings:
    """folder: on the node's own disk. limit: bytes that it may hold, None: any number."""

    folder: Path
    limit: int | None = None


class ShardCache:
    """The shards of one folder or URL, by number."""

    def __init__(self, source: str, index: bytes, entries: list[dict[str, Any]], settings: CacheSettings):
        # another index is another data set, even at the same place
        name = hashlib.blake2b(source.encode() + b"\0" + index, digest_size=8).hexdigest()
        self.folder = settings.folder / f"{source.rpartition('/')[2]}-{name}"
        self._source, self._entries, self._settings = source, entries, settings
        self._touched: dict[int, float] = {}

    def ensure(self, shard: int) -> None:
        """Has the shard here. Raises UserError where it is damaged twice, OSError where it cannot be fetched."""
        path = self._path(shard)
        if not path.exists():
            self._fetch(shard)
        now = time.monotonic()
        if now - self._touched.get(shard, float("-inf")) > SECONDS_BETWEEN_TOUCHES:
            self._touched[shard] = now
            with suppress(FileNotFoundError):  # removed since; whoever reads it asks again
                os.utime(path)  # what is in use is removed last

    def mend(self, shard: int) -> bool:
        """Where the shard's file is damaged: sets it aside, fetches it once more, and returns True."""
        path = self._path(shard)
        with self._lock(shard):
            if not path.exists() or complaint(path, self._entries[shard]["raw_data"]) is None:
                return False
            path.replace(path.with_name(path.name + DAMAGED))
        self._fetch(shard)
        return True

    def _path(self, shard: int) -> Path:
        return self.folder / self._entries[shard]["raw_data"]["basename"]

    def _lock(self, shard: int) -> FileLock:
        path = self._path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{path}.lock")

    def _fetch(self, shard: int) -> None:
        entry, path = self._entries[shard], self._path(shard)
        packed = entry["zip_data"]
        stored = packed or entry["raw_data"]
        url, arrived = f"{self._source}/{stored['basename']}", path.with_name(path.name + ".part")
        with self._lock(shard):
            if path.exists():
                return
            download(url, arrived)
            if complaint(arrived, stored) is not None:
                arrived.replace(path.with_name(path.name + DAMAGED))
                download(url, arrived)
            found = complaint(arrived, stored)
            if found is not None:
                raise UserError(
                    f"data.streams: {url}: this shard is damaged ({found}), and was when it was fetched once more; "
                    f"make it anew there, or take it out of the data set"
                )
            if packed:
                self._unpack(arrived, entry, url)
            arrived.replace(path)
        self._make_room(path)

    def _unpack(self, arrived: Path, entry: dict[str, Any], url: str) -> None:
        arrived.write_bytes(decompress(entry["compression"], arrived.read_bytes()))
        found = complaint(arrived, entry["raw_data"])
        if found is not None:
            raise UserError(f"data.streams: {url}: what this shard unpacks to is damaged ({found})")

    def _make_room(self, newest: Path) -> None:
        limit = self._settings.limit
        if limit is None:
            return
        with FileLock(self._settings.folder / "room.lock"):
            held = []
            for file in self._settings.folder.rglob("*.mds"):
                try:
                    held.append((file.stat().st_mtime, file.stat().st_size, file))
                except FileNotFoundError:
                    continue
            total = sum(size for _, size, _ in held)
            for _, size, file in sorted(held):
                if total <= limit:
                    break
                if file != newest:
                    file.unlink(missing_ok=True)
                    total -= size


def complaint(path: Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with a shard's file by its size and checksum; None where nothing is, or no checksum is known."""
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{size} bytes, expected {expected['bytes']}"
    if not expected["hashes"]:
        return None
    kind, known = next(iter(expected["hashes"].items()))
    found = get_hash(kind, path.read_bytes())
    return None if found == known else f"{kind} {found}, expected {known}"


def read_index(source: str) -> bytes:
    """The bytes of a data set's index, here or elsewhere. Raises FileNotFoundError, or UserError if out of reach."""
    if is_local(source):
        return Path(local_path(source), "index.json").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index.json"
        try:
            download(f"{source}/index.json", file)
        except Unreachable as error:
            raise UserError(f"data.streams: {error}") from None
        return file.read_bytes()


def is_local(source: str) -> bool:
    """Whether it is a path, or a file:// URL."""
    return "://" not in source or source.startswith("file://")


def local_path(source: str) -> Path:
    """The path of a local source."""
    return Path(source.removeprefix("file://")).expanduser()
