"""Files of a source, wherever they lie: a path, or a URL of any file system that fsspec knows."""

import itertools
import re
from typing import IO

from ecdit.data.remote import file_system
from ecdit.errors import UserError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Files:
    """The file system of a source. Names are absolute paths or URLs, without a slash at the end."""

    def __init__(self, source: str):
        self.source = source.rstrip("/") or source
        self._fs = file_system(self.source)

    def __reduce__(self):
        return Files, (self.source,)  # connections are not for other processes

    def matching(self) -> list[str]:
        """The names that the source stands for, `{000..123}` and `*` expanded."""
        found = []
        for name in expand(self.source):
            if "*" in name:
                found += sorted(self._full(path) for path in self._call(self._fs.glob, name))
            elif self.exists(name):
                found.append(self._full(self._fs._strip_protocol(name)))
        return found

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return self._call(self._fs.exists, name)

    def is_folder(self, name: str) -> bool:
        """Whether it is one."""
        return self._call(self._fs.isdir, name)

    def children(self, name: str) -> list[str]:
        """Names of what lies directly in a folder, sorted."""
        return sorted(self._full(path) for path in self._call(self._fs.ls, name, detail=False))

    def below(self, name: str) -> list[str]:
        """Names of all files in a folder and its folders, sorted."""
        return sorted(self._full(path) for path in self._call(self._fs.find, name))

    def size(self, name: str) -> int:
        """Bytes of a file; 0 where the server does not say."""
        return self._fs.size(name) or 0

    def open(self, name: str) -> IO[bytes]:
        """To read. Raises OSError where it cannot be."""
        return self._fs.open(name, "rb")

    def piece(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file. Raises OSError where it cannot be read."""
        data = self._fs.cat_file(name, start=start, end=stop)
        return data if len(data) <= stop - start else data[start:stop]  # from a server that knows no ranges

    def read(self, name: str) -> bytes | None:
        """All bytes of a file, None where there is none. Raises OSError where it cannot be read."""
        try:
            return self._fs.cat_file(name)
        except FileNotFoundError:
            return None
        except ValueError as error:  # a name that no file can have: with a NUL, or half of a surrogate pair
            raise OSError(f"{error}: {name!r}") from None

    @property
    def local(self) -> bool:
        """Whether seeking in a file costs nothing."""
        return "file" in self._fs.protocol

    def _full(self, path: str) -> str:
        return self._fs.unstrip_protocol(path).removeprefix("file://").rstrip("/")

    def _call(self, operation, *args, **kwargs):
        try:
            return operation(*args, **kwargs)
        except OSError as error:
            raise UserError(f"{self.source}: cannot be read: {error}") from None


def expand(name: str) -> list[str]:
    """`a-{08..11}.tar` -> a-08.tar ... a-11.tar."""
    pieces = RANGE.split(name)
    ranges = [
        [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    fixed = pieces[0::3]
    return ["".join(itertools.chain(*zip(fixed, (*chosen, ""), strict=True))) for chosen in itertools.product(*ranges)]
