"""Saving and loading by all ranks of a job. A save goes on in the background once the state is copied to host memory.

Ranks talk over a gloo group of their own, so that a save and the training step never wait for each other's messages.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from parallel.checkpoint import CheckpointError
from parallel.checkpoint.boxes import Boxes
from parallel.checkpoint.folder import (
    Checkpoint,
    Keep,
    clear_partial,
    commit,
    committed,
    describe,
    open_checkpoint,
    partial_folder,
    reason_of,
    room,
    set_aside,
    verify,
)
from parallel.checkpoint.storage import Saving, Writer
from parallel.topology import Topology

HOST_MEMORY_SHARE = 0.9  # of what is free, that staging may take
# for tests alone: seconds that a save takes longer, before its files are written and before they are renamed
DELAY = "ECDIT_TEST_SAVE_DELAY"


@dataclass(frozen=True)
class Saved:
    """How a save ended, the same on every rank. error: None where it was committed."""

    step: int
    error: str | None


class CheckpointStore:
    """A run's checkpoints, as the ranks of a job see them."""

    def __init__(self, root: Path, topology: Topology, keep: Keep, *, asynchronous: bool, timeout_minutes: float):
        self.root, self._topology, self._keep, self._asynchronous = root, topology, keep, asynchronous
        timeout = timedelta(minutes=timeout_minutes)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if topology.ranks > 1 else None
        self._thread: threading.Thread | None = None
        self._ended: Saved | None = None
        self._staging: dict[str, Boxes] = {}

    # --------------------------------------------------------------------------------------------------------- loading

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and a message for each broken one, which is set aside.

        The ranks share the reading. Half-written ones are removed.
        """
        folders = self._first(lambda: (clear_partial(self.root), committed(self.root))[1])
        messages = []
        for folder in reversed(folders):
            own = verify(folder, self._topology.rank, self._topology.ranks)
            problems = list(dict.fromkeys(problem for part in self._gather(own) for problem in part))
            if not problems:
                return open_checkpoint(folder), messages
            messages.append(self._first(lambda folder=folder, problems=problems: set_aside(folder, problems)))
        return None, messages

    # ---------------------------------------------------------------------------------------------------------- saving

    def check_memory(self, state: dict[str, Boxes]) -> None:
        """Raises CheckpointError where host memory cannot hold the copy that saving in the background needs."""
        if not self._asynchronous:
            return
        needed = sum(boxes.nbytes for boxes in state.values())
        free = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * HOST_MEMORY_SHARE
        if needed > free:
            raise CheckpointError(
                f"checkpoint.asynchronous: true needs {needed / 2**30:.2f} GiB of host memory on a rank for the copy "
                f"that is being written; {free / 2**30:.2f} GiB are free for it; set it to false"
            )

    def save(self, step: int, state: dict[str, Boxes], meta: dict[str, Any]) -> None:
        """Begins to save; where it is asynchronous, returns once the state is copied. Waits for the save before."""
        self.wait()
        if not self._asynchronous:
            self._ended = self._save(step, state, meta)
            return
        self._stage(state)

        def run() -> None:
            self._ended = self._save(step, self._staging, meta)

        self._thread = threading.Thread(target=run, name=f"save step {step}")
        self._thread.start()

    @property
    def under_way(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def ended(self) -> Saved | None:
        """How the last save ended, once, when it has."""
        if self.under_way:
            return None
        self._thread = None
        ended, self._ended = self._ended, None
        return ended

    def wait(self) -> None:
        """Until no save is under way."""
        if self._thread is not None:
            self._thread.join()

    def _stage(self, state: dict[str, Boxes]) -> None:
        """Copies this rank's part to host memory, into the same buffers every time."""
        if self._staging.keys() != state.keys():
            pin = self._topology.device.type == "cuda"
            self._staging = {
                name: Boxes(
                    boxes.whole,
                    [(at, torch.empty(v.shape, dtype=v.dtype, pin_memory=pin)) for at, v in boxes.parts],
                )
                for name, boxes in state.items()
            }
        for name, boxes in state.items():
            for (_, target), (_, source) in zip(self._staging[name].parts, boxes.parts, strict=True):
                target.copy_(source.detach(), non_blocking=True)
        if self._topology.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _save(self, step: int, state: dict[str, Boxes], meta: dict[str, Any]) -> Saved:
        """Writes, describes and commits. Every rank learns how it ended."""
        partial = partial_folder(self.root, step)
        try:
            self._first(lambda: _fresh(partial))
            _delay()
            dcp.save(
                state,
                storage_writer=Writer(partial),
                planner=Saving(),
                process_group=self._group,
                no_dist=self._group is None,
            )
            own = self._attempt(lambda: {p.name: describe(p) for p in partial.glob(f"__{self._topology.rank}_*")})
            files = {name: what for part in own for name, what in part.items()}
            _delay()
            self._first(lambda: commit(self.root, step, files, meta, self._keep))
        except (dcp.CheckpointException, CheckpointError, OSError) as error:
            self._first(lambda: shutil.rmtree(partial, ignore_errors=True))
            where = self.root / f"step-{step}"
            return Saved(step, f"{where}: cannot write this checkpoint: {reason_of(error)}{room(self.root)}")
        return Saved(step, None)

    # ------------------------------------------------------------------------------------------- all ranks, one outcome

    def _first(self, action: Callable[[], Any]) -> Any:
        """The first rank acts; all get what it returned. Raises CheckpointError on all where it raised OSError."""
        answer = [None, None]
        if self._topology.first:
            try:
                answer[0] = action()
            except OSError as error:
                answer[1] = str(error)
        if self._group is not None:
            dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return answer[0]

    def _attempt(self, action: Callable[[], Any]) -> list[Any]:
        """All ranks act; all get what each returned. Raises CheckpointError on all where one raised OSError."""
        try:
            own = (action(), None)
        except OSError as error:
            own = (None, str(error))
        answers = self._gather(own)
        for _, error in answers:
            if error is not None:
                raise CheckpointError(error)
        return [answer for answer, _ in answers]

    def _gather(self, own: Any) -> list[Any]:
        if self._group is None:
            return [own]
        answers = [None] * self._topology.ranks
        dist.all_gather_object(answers, own, group=self._group)
        return answers


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _delay() -> None:
    if DELAY in os.environ:
        time.sleep(float(os.environ[DELAY]))
