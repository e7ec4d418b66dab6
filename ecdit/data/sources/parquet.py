"""Parquet files: a column of pictures (bytes, a struct with `bytes` or `path`, or paths) and one of captions."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ecdit.data.sources.files import Files
from ecdit.data.sources.pair import Columns, Fault, Pair, Part, listed
from ecdit.errors import UserError

ROWS = 64  # that are decoded at once: their pictures are in memory


@dataclass(frozen=True)
class ParquetPart:
    """Rows first ... first + size - 1 of a file."""

    files: Files
    path: str
    columns: Columns
    first: int
    size: int
    name: str
    counted: bool = True

    def pairs(self) -> Iterator[Pair | Fault]:
        arrow = _arrow(self.path)
        stem, root = PurePosixPath(self.path).stem, self.path.rpartition("/")[0]
        try:
            with self.files.open(self.path) as file:
                table = arrow.parquet.ParquetFile(file)
                names = [self.columns.image, self.columns.caption]
                missing = [name for name in names if name not in table.schema_arrow.names]
                if missing:
                    has = ", ".join(table.schema_arrow.names)
                    yield Fault(self.path, "no column", f"no column {missing[0]!r}; it has {has}")
                    return
                for row, fields in self._rows(table, names):
                    yield self._pair(f"{stem}/{row}", root, *(fields[name] for name in names))
        except (OSError, ValueError, arrow.ArrowException) as error:
            yield Fault(self.path, "broken parquet", f"what follows is not read: {error}")

    def _rows(self, table: Any, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Only the row groups that hold this part's rows are read."""
        begin, groups, skipped = 0, [], 0
        for group in range(table.num_row_groups):
            end = begin + table.metadata.row_group(group).num_rows
            if end <= self.first:
                skipped = end
            elif begin < self.first + self.size:
                groups.append(group)
            begin = end
        row = skipped
        for batch in table.iter_batches(ROWS, row_groups=groups, columns=names):
            wanted = slice(max(0, self.first - row), max(0, self.first + self.size - row))
            start = row + wanted.start
            row += len(batch)
            yield from enumerate(batch[wanted].to_pylist(), start=start)
            if row >= self.first + self.size:
                return

    def _pair(self, key: str, root: str, picture: Any, caption: Any) -> Pair | Fault:
        if isinstance(picture, dict):
            picture = picture.get("bytes") or picture.get("path")
        if isinstance(picture, str):
            try:
                elsewhere = picture.startswith("/") or "://" in picture
                picture = Files(picture).read(picture) if elsewhere else self.files.read(f"{root}/{picture}")
            except (OSError, UserError) as error:
                return Fault(key, "cannot be read", str(error))
        return Pair(key, picture, listed(caption))


def parts(files: Files, path: str, columns: Columns, pairs: int) -> list[Part]:
    """Its rows in ranges. A file that is none is one part, which tells what is wrong with it."""
    arrow = _arrow(path)
    try:
        with files.open(path) as file:
            rows = arrow.parquet.ParquetFile(file).metadata.num_rows
    except (OSError, ValueError, arrow.ArrowException):
        rows = 1
    return [
        ParquetPart(files, path, columns, first, min(pairs, rows - first), f"{path} from row {first}")
        for first in range(0, rows, pairs)
    ]


def _arrow(path: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need the package pyarrow; install `ecdit[parquet]`") from None
    return pyarrow
