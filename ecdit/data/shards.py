"""MDS shards by sample number: read where they lie, or through a cache; checked before they are read.

What a sample has: `key`, its name; `captions` (a list) or `caption`; and `image` (a JPEG or PNG file) or latents and
embeddings (see `ecdit.data.samples`). Of streaming's encodings an image may have bytes, png or jpeg.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ecdit.data.cache import CacheSettings, ShardCache, complaint, default_folder, is_local, local_path, read_index
from ecdit.data.streaming_import import MDSWriter, Reader, reader_from_json
from ecdit.errors import UserError

INDEX = "index.json"
SHARD_BYTES = 64 << 20
HASHED_AT_START = 2 << 30  # data sets up to this size are hashed whole before the first step


def write_shards(
    samples: Iterable[dict[str, Any]],
    out: Path,
    columns: dict[str, str],
    *,
    shard_bytes: int | None = None,
    compression: str | None = None,
) -> int:
    """Writes samples and their index to a new folder. Returns their number.

    columns: streaming's encoding of each column. compression: None or streaming's name of one, such as zstd:3.
    """
    count, limit = 0, shard_bytes or SHARD_BYTES
    with MDSWriter(
        out=str(out), columns=columns, hashes=["xxh64"], size_limit=limit, compression=compression
    ) as writer:
        for sample in samples:
            writer.write(sample)
            count += 1
    return count


class ShardFolder:
    """The samples of a folder or URL of shards, by number.

    Raises UserError for what is missing, damaged or of another kind. Shards that lie here uncompressed are read in
    place, others through the cache.
    """

    def __init__(self, source: str, cache: CacheSettings | None = None):
        self.source = source.rstrip("/")
        index, self._entries = _entries(self.source)
        direct = is_local(self.source) and not any(entry["zip_data"] for entry in self._entries)
        if direct:
            self._cache, where = None, local_path(self.source)
        else:
            self._cache = ShardCache(self.source, index, self._entries, cache or CacheSettings(default_folder()))
            where = self._cache.folder
        self._where = where
        self._readers: list[Reader] = [reader_from_json(str(where), None, entry) for entry in self._entries]
        self.sizes = [reader.samples for reader in self._readers]
        self._ends = []
        for size in self.sizes:
            self._ends.append(size + (self._ends[-1] if self._ends else 0))
        self.columns: list[str] = self._entries[0]["column_names"]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def bytes(self) -> int:
        """Of all shards, unpacked."""
        return sum(entry["raw_data"]["bytes"] for entry in self._entries)

    @property
    def cached(self) -> bool:
        """Whether shards are fetched or unpacked before they are read."""
        return self._cache is not None

    def check(self) -> None:
        """Looks at every shard that lies here: its size, and in data sets that are not large its checksum."""
        if not is_local(self.source):
            return
        hashed = self.bytes <= HASHED_AT_START
        for entry in self._entries:
            stored = entry["zip_data"] or entry["raw_data"]
            path = local_path(self.source) / stored["basename"]
            remedy = f"copy it again, or make the shards anew with `ecdit prepare SOURCE {self.source}` elsewhere"
            if not path.is_file():
                raise UserError(f"data.streams: {path}: this shard is missing; {remedy}")
            found = complaint(path, stored if hashed else stored | {"hashes": {}})
            if found is not None:
                raise UserError(f"data.streams: {path}: this shard is damaged ({found}); {remedy}")

    def sample(self, number: int) -> dict[str, Any]:
        """Raises UserError where the sample's shard is damaged and cannot be mended."""
        shard = self.shard_of(number)
        reader, index = self._readers[shard], number - self._ends[shard] + self.sizes[shard]
        try:
            self.ensure(shard)
            try:
                return reader.get_item(index)
            except FileNotFoundError:  # another process has made room since
                self.ensure(shard)
                return reader.get_item(index)
        except FileNotFoundError as error:
            raise UserError(f"data.streams: {error.filename}: this shard is missing") from None
        except (ValueError, IndexError, KeyError) as error:
            if self.mend(number):
                return reader.get_item(index)
            raise UserError(f"data.streams: {self.source}: sample {number} cannot be read: {error!r}") from None

    def shard_of(self, number: int) -> int:
        """The shard that holds a sample."""
        return bisect_right(self._ends, number)

    def ensure(self, shard: int) -> None:
        """Has a shard here, ready to be read."""
        if self._cache is not None:
            self._cache.ensure(shard)

    def mend(self, number: int) -> bool:
        """For a sample that cannot be read: True where its shard was damaged and has been fetched once more.

        Raises UserError where it is damaged and this is the only copy.
        """
        shard = self.shard_of(number)
        if self._cache is not None:
            return self._cache.mend(shard)
        stored = self._entries[shard]["raw_data"]
        path = self._where / stored["basename"]
        found = complaint(path, stored)
        if found is not None:
            raise UserError(f"data.streams: {path}: this shard is damaged ({found}); copy it again")
        return False

    def __reduce__(self):
        settings = self._cache._settings if self._cache is not None else None
        return ShardFolder, (self.source, settings)


def _entries(source: str) -> tuple[bytes, list[dict[str, Any]]]:
    index = f"{source}/{INDEX}"
    try:
        data = read_index(source)
        entries = json.loads(data)["shards"]
        for entry in entries:
            reader_from_json("", None, entry)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"data.streams: {source}: {INDEX} is missing; make shards with `ecdit prepare SOURCE {source}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"data.streams: {index} cannot be read as an index of MDS shards: {error!r}") from None
    if not entries:
        raise UserError(f"data.streams: {index} lists no shards")
    if any("pkl" in entry["column_encodings"] for entry in entries):
        raise UserError(f"data.streams: {source}: pickled columns are not read")
    return data, entries
