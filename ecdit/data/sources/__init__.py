"""Collections of image-text pairs, cut into parts: what one process reads from its beginning to its end.

A source is a path, a URL that fsspec knows, or either with `*` and `{000..123}` in it. Which parts it has depends on
the source alone, so that a preparation that was interrupted meets the same ones again.
"""

from ecdit.data.shards import INDEX
from ecdit.data.sources import folder, mds, parquet, tar
from ecdit.data.sources.files import Files
from ecdit.data.sources.pair import Columns, Fault, Pair, Part
from ecdit.errors import UserError

__all__ = ["Columns", "Fault", "Pair", "Part", "find_parts"]

FILES = (*tar.ENDINGS, ".parquet", ".jsonl")
VALID = (
    "a WebDataset .tar, a folder of images, a .jsonl or .parquet file, a folder of MDS shards, or of .tar or .parquet"
)


def find_parts(source: str, columns: Columns, pairs: int) -> list[Part]:
    """The parts of a source, of at most `pairs` pairs where it can be cut.

    Raises UserError for a source that is absent or of no known kind.
    """
    files = Files(source)
    names = files.matching()
    if not names:
        raise UserError(f"{source}: no such file or folder; valid: shapes, {VALID}")
    if len(names) == 1 and not names[0].endswith(FILES):
        parts = _in_folder(files, names[0], columns, pairs)
    else:
        parts = [part for name in names for part in _in_file(files, name, columns, pairs)]
    if not parts:
        raise UserError(f"{source}: not a source that is known; valid: shapes, {VALID}")
    return parts


def _in_file(files: Files, name: str, columns: Columns, pairs: int) -> list[Part]:
    if name.endswith(tar.ENDINGS):
        return tar.parts(files, name)
    if name.endswith(".parquet"):
        return parquet.parts(files, name, columns, pairs)
    if name.endswith(".jsonl"):
        return folder.listed_parts(files, name, columns, pairs)
    return []


def _in_folder(files: Files, name: str, columns: Columns, pairs: int) -> list[Part]:
    if files.exists(f"{name}/{INDEX}"):
        return mds.parts(name, columns, pairs)
    if not files.is_folder(name):
        return []
    inside = files.children(name)
    for ending in ("tar", "parquet"):
        found = [child for child in inside if child.endswith(f".{ending}")]
        if found:
            return [part for child in found for part in _in_file(files, child, columns, pairs)]
    for listing in folder.LISTINGS:
        if f"{name}/{listing}" in inside:
            return folder.listed_parts(files, f"{name}/{listing}", columns, pairs)
    return folder.parts(files, name, pairs)
