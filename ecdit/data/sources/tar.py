"""WebDataset tars: the files of one sample share the name up to the first dot, and follow each other."""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ecdit.data.sources.files import Files
from ecdit.data.sources.pair import Fault, Pair, Part, listed
from ecdit.data.sources.pictures import PICTURES

ENDINGS = (".tar", ".tar.gz", ".tgz")
CUT = 1 << 30  # bytes from which on a tar that can be cut is cut


@dataclass(frozen=True)
class TarPart:
    """A tar, or the samples whose first file lies in the bytes [start, stop) of one."""

    files: Files
    path: str
    start: int
    stop: int | None
    name: str
    size: int
    counted: bool = False

    def pairs(self) -> Iterator[Pair | Fault]:
        stem = PurePosixPath(self.path).name.split(".tar")[0]
        sample: _Sample | None = None
        try:
            with self.files.open(self.path) as file:
                file.seek(self.start)
                mode = "r:" if self.stop is not None else "r|*"
                with tarfile.open(fileobj=file, mode=mode) as archive:
                    for member in archive:
                        if not member.isfile():
                            continue
                        key, ending = split_name(member.name)
                        if sample is None or sample.key != key:
                            if sample is not None:
                                yield sample.pair(stem)
                            sample = None
                            if self.stop is not None and member.offset >= self.stop:
                                return
                            sample = _Sample(key, {})
                        sample.files[ending] = archive.extractfile(member).read()
                    ended = archive.offset + tarfile.BLOCKSIZE <= self.start + self.size
            if sample is not None:
                yield sample.pair(stem)
            if not ended and self.path.endswith(".tar") and self.size:
                # tarfile takes a header that is cut off for the end
                yield Fault(stem, "broken tar", f"{self.path}: it breaks off without an end")
        except (tarfile.TarError, OSError, EOFError) as error:
            where = f"{stem}/{sample.key}" if sample is not None else stem
            yield Fault(where, "broken tar", f"{self.path}: what follows is not read: {error}")


@dataclass
class _Sample:
    """The files of one sample, by what follows the first dot of their names."""

    key: str
    files: dict[str, bytes]

    def pair(self, stem: str) -> Pair:
        picture = next((data for ending, data in self.files.items() if f".{ending.lower()}" in PICTURES), None)
        captions = [self.files["txt"]] if "txt" in self.files else []
        if not captions and "json" in self.files:
            captions = _captions_in(self.files["json"])
        return Pair(f"{stem}/{self.key}", picture, captions)


def _captions_in(data: bytes) -> list[str | bytes]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return []
    return listed(fields.get("captions", fields.get("caption"))) if isinstance(fields, dict) else []


def split_name(name: str) -> tuple[str, str]:
    """`a/b.0.jpg` -> (`a/b`, `0.jpg`)."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending


def parts(files: Files, path: str) -> list[Part]:
    """The whole tar; pieces of about CUT bytes of one that is larger, not compressed, and cheap to look through."""
    size = files.size(path)
    if size < 2 * CUT or not files.local or not path.endswith(".tar"):
        return [TarPart(files, path, 0, None, path, size)]
    cuts, last = [0], None
    try:
        with tarfile.open(path, mode="r:") as archive:
            for member in archive:
                key, _ = split_name(member.name)
                if key != last and member.offset - cuts[-1] >= CUT:
                    cuts.append(member.offset)
                last = key
                archive.members = []  # or it keeps every header
    except (tarfile.TarError, OSError):
        pass  # the piece that holds the break tells of it
    ends = [*cuts[1:], size]
    return [TarPart(files, path, a, b, f"{path} from {a}", b - a) for a, b in zip(cuts, ends, strict=True)]
