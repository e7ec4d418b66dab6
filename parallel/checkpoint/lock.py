"""One run a folder: a lock that its owner's death releases."""

import fcntl
import os
import socket
from pathlib import Path

from parallel.checkpoint import CheckpointError


class FolderLock:
    """Held by the first rank of a run as long as its process lives, however it dies: the kernel keeps it."""

    def __init__(self, path: Path):
        """Takes the lock. Raises CheckpointError where another process has it, naming that one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise CheckpointError(
                f"{path.parent}: {owner} is training in this folder; wait, or name another run"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Lets another run have the folder."""
        self._file.close()
