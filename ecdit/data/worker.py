"""A process that works for another ends with it, however that ends: nobody else would end it."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """To be called at a worker's start. Where a server forks it (`forkserver`), which lives as long as its workers do,
    the death of the process that asked for it is no death of its parent, for which torch's workers look."""
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True, name="end with parent").start()
