"""One owner a folder: a lock that its owner's death releases."""

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

from parallel.checkpoint import CheckpointError

TRAINING = "is training in this folder; wait, or name another run"


class NoLocks(CheckpointError):
    """The file system cannot lock a file, so nothing keeps two owners apart."""


class FolderLock:
    """Held as long as its process lives, however that dies: the kernel keeps it."""

    def __init__(self, path: Path, does: str = TRAINING, of: Path | None = None):
        """Takes the lock of the folder `of`: the one that `path` lies in, if not given.

        Raises CheckpointError where another process has it, naming the folder, that process and what it `does`, and
        NoLocks.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file, owned = _lock(path)
        if not owned:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise CheckpointError(f"{of or path.parent}: {owner} {does}")
        self._sign()

    def _sign(self) -> None:
        """Says in the file whose it is. Raises OSError that names the file, and leaves none, where the disk is full."""
        try:
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        except OSError as error:
            error.filename = str(self._path)
            with suppress(OSError):  # closing tries to write once more
                self.remove()
            raise

    def release(self) -> None:
        """Lets another run have the folder."""
        self._file.close()

    def remove(self) -> None:
        """Lets another run have the folder, and leaves no file behind."""
        self._path.unlink(missing_ok=True)
        self.release()


def _lock(path: Path) -> tuple[IO[str], bool]:
    """The file, and whether it is locked now: not where another process has it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        except BlockingIOError:
            return file, False
        except FileNotFoundError:
            pass
        except OSError as error:
            file.close()
            raise NoLocks(
                f"{path}: this file system cannot lock a file ({error.strerror}), which keeps two commands out of one "
                "folder; choose a folder on another, or mount this one with locks"
            ) from None
        file.close()  # its owner has removed it since it was opened: who locks it keeps nobody out
