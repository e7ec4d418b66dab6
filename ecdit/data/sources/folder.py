"""Folders of images: a .txt of the same name beside each, or one .jsonl file that lists pictures and captions."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from ecdit.data.sources.files import Files
from ecdit.data.sources.pair import Columns, Fault, Pair, Part, listed
from ecdit.data.sources.pictures import PICTURES

LISTINGS = ("captions.jsonl", "metadata.jsonl")
PICTURE_FIELDS, CAPTION_FIELDS = ("file_name", "path", "file"), ("captions", "text")


@dataclass(frozen=True)
class FolderPart:
    """Some pictures of a folder, by their names in it."""

    files: Files
    root: str
    names: tuple[str, ...]
    name: str
    counted: bool = True

    @property
    def size(self) -> int:
        return len(self.names)

    def pairs(self) -> Iterator[Pair | Fault]:
        for name in self.names:
            key = str(PurePosixPath(name).with_suffix(""))
            try:
                caption = self.files.read(f"{self.root}/{key}.txt")
                picture = self.files.read(f"{self.root}/{name}")
            except OSError as error:
                yield Fault(key, "cannot be read", str(error))
                continue
            yield Pair(key, picture, [] if caption is None else [caption])


def parts(files: Files, root: str, pairs: int) -> list[Part]:
    """Its pictures in the order of their names."""
    names = [name.removeprefix(f"{root}/") for name in files.below(root) if name.lower().endswith(PICTURES)]
    ranges = [names[first : first + pairs] for first in range(0, len(names), pairs)]
    return [FolderPart(files, root, tuple(some), f"{root} from {some[0]}") for some in ranges]


@dataclass(frozen=True)
class ListedPart:
    """The lines in the bytes [start, stop) of a .jsonl file, of which `first` come before; pictures lie relative to
    the file."""

    files: Files
    path: str
    columns: Columns
    start: int
    stop: int
    first: int
    size: int
    name: str
    counted: bool = True

    def pairs(self) -> Iterator[Pair | Fault]:
        root = self.path.rpartition("/")[0]
        try:
            lines = self.files.piece(self.path, self.start, self.stop).split(b"\n")
        except OSError as error:
            yield Fault(self.path, "cannot be read", str(error))
            return
        for number, line in enumerate(lines[: self.size], start=self.first):
            yield self._pair(root, number, line)

    def _pair(self, root: str, number: int, line: bytes) -> Pair | Fault:
        where = f"{self.path}:{number + 1}"
        try:
            fields = json.loads(line)
            name = next(fields[k] for k in (self.columns.image, *PICTURE_FIELDS) if isinstance(fields.get(k), str))
        except (ValueError, AttributeError, RecursionError):  # the last where brackets nest without end
            return Fault(where, "broken line", f"no JSON object in UTF-8: {line[:80]!r}")
        except StopIteration:
            return Fault(where, "no picture", f"none of the fields {self.columns.image}, {', '.join(PICTURE_FIELDS)}")
        caption = next((fields[k] for k in (self.columns.caption, *CAPTION_FIELDS) if k in fields), None)
        try:
            picture = self.files.read(f"{root}/{name}")
        except OSError as error:
            return Fault(name, "cannot be read", str(error))
        return Pair(str(PurePosixPath(name).with_suffix("")), picture, listed(caption))


def listed_parts(files: Files, path: str, columns: Columns, pairs: int) -> list[Part]:
    """Its lines, in order."""
    found, lines, first, start, stop = [], 0, 0, 0, 0
    with files.open(path) as file:
        for line in file:
            stop += len(line)
            lines += 1
            if lines - first == pairs:
                found.append((start, stop, first, lines - first))
                start, first = stop, lines
    if lines > first:
        found.append((start, stop, first, lines - first))
    return [ListedPart(files, path, columns, *place, f"{path} from line {place[2] + 1}") for place in found]
