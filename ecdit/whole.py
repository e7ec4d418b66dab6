"""Files that are written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """The name of another file, to be written, which then takes the place of `file`; where that fails nothing is left
    of it, and an OSError that names no file, as of a full disk, names this one."""
    aside = file.with_name(f"{file.name}.partial")
    try:
        yield aside
        aside.replace(file)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file)
        raise
