"""The parts of one rank, given to its processes, and how far they are.

Without encoders a process takes whole parts. With encoders the rank itself goes through a part and encodes, and its
processes decode and crop for it.
"""

import multiprocessing
import shutil
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ecdit.data.prepare.part import Counts, ahead, folder_of, look, write_part
from ecdit.data.prepare.settings import Settings
from ecdit.data.sources import Part
from ecdit.data.worker import end_with_parent
from ecdit.errors import UserError
from parallel.crew import Crew

SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_LINES = 0.5, 30.0
_looked_at = None  # the counter that a process's parts add to


class Work:
    """What is left to do for one rank of `crew`, with `workers` processes."""

    def __init__(self, parts: list[Part], folder: Path, settings: Settings, workers: int, crew: Crew):
        self._parts, self._folder, self._settings = parts, folder, settings
        self._workers, self._crew = workers, crew
        mine = range(crew.rank, len(parts), crew.ranks)
        self._left = [number for number in mine if not (folder / folder_of(number)).exists()]
        self._encoders = self._load_encoders()

    def _load_encoders(self):
        if not (self._settings.autoencoder or self._settings.text_encoder):
            return None
        from ecdit.data.prepare.encode import Encoders  # imports transformers and diffusers

        return Encoders(self._settings, self._crew.device)

    def describe_encoders(self) -> str | None:
        """JSON for the file beside the shards; None where nothing is encoded."""
        return None if self._encoders is None else self._encoders.describe().as_json()

    def run(self) -> None:
        """Does it. Raises UserError where a process was killed, and OSError where the disk is full."""
        for number in self._left:
            for begun in self._folder.glob(f"{folder_of(number)}.*"):
                shutil.rmtree(begun, ignore_errors=True)
        if not self._left:
            return
        # a server that forks: neither threads nor open connections of this process reach the others
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ecdit.data.prepare.part"])
        counter = context.Value("q", 0)
        pool = ProcessPoolExecutor(self._workers, context, _begin, (counter,))
        with pool, _Bar([self._parts[n] for n in self._left], counter, self._crew) as bar:
            try:
                (self._encode if self._encoders else self._spread)(pool, counter, bar)
            except BrokenProcessPool:
                raise UserError(
                    f"a process was killed, perhaps for want of memory; {len(self._left)} parts were left. "
                    f"The same command goes on; --workers {max(1, self._workers // 2)} needs less"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _spread(self, pool: ProcessPoolExecutor, counter, bar: "_Bar") -> None:
        futures = {
            pool.submit(_whole_part, self._parts[number], number, self._folder, self._settings): number
            for number in self._left
        }
        for future in as_completed(futures):
            future.result()
            bar.finished(self._parts[futures[future]])

    def _encode(self, pool: ProcessPoolExecutor, counter, bar: "_Bar") -> None:
        def looker(batches):
            return ahead(lambda batch: pool.submit(look, batch, self._settings), batches, 2 * self._workers)

        def count(pairs: int) -> None:
            with counter.get_lock():
                counter.value += pairs

        for number in self._left:
            part = self._parts[number]
            write_part(part, number, self._folder, self._settings, looker=looker, encode=self._encoders, count=count)
            bar.finished(part)


def _begin(counter) -> None:
    """In a process at its start: the counter, and an end with the process that it works for, however that ended."""
    global _looked_at
    _looked_at = counter
    end_with_parent()


def _whole_part(part: Part, number: int, folder: Path, settings: Settings) -> Counts:
    def count(pairs: int) -> None:
        with _looked_at.get_lock():
            _looked_at.value += pairs

    return write_part(part, number, folder, settings, count=count)


class _Bar:
    """Pairs so far, pairs/s and time left: a bar on a terminal, else a line now and then. The first rank's alone.

    The pairs of a tar are not known before it was read: what is left is estimated from the bytes of those that were.
    """

    def __init__(self, parts: list[Part], counter, crew: Crew):
        self._counter, self._shown = counter, crew.first
        self._counted, self._size = all(part.counted for part in parts), sum(part.size for part in parts)
        self._ended, self._read_at_end = 0, 0
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._stopped = threading.Event()

    def finished(self, part: Part) -> None:
        """A part that is done."""
        self._ended += part.size
        self._read_at_end = self._counter.value

    def total(self) -> int | None:
        """Pairs of all parts, as far as it can be told."""
        if self._counted:
            return self._size
        return round(self._read_at_end * self._size / self._ended) if self._ended else None

    def __enter__(self) -> "_Bar":
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self._shown:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._shown:
            self._thread.join()

    def _run(self) -> None:
        began, told = time.monotonic(), time.monotonic()
        columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        with Progress(*columns, console=self._console, disable=not self._console.is_terminal) as bar:
            task = bar.add_task("", total=self.total())
            while not self._stopped.wait(SECONDS_BETWEEN_LOOKS):
                done, total, now = self._counter.value, self.total(), time.monotonic()
                rate = done / (now - began)
                text = f"{done}{f'/{total}' if total else ''} pairs  {rate:.0f} pairs/s"
                bar.update(task, completed=done, total=total, description=text)
                if not self._console.is_terminal and now - told >= SECONDS_BETWEEN_LINES:
                    told = now
                    left = f"  {(total - done) / rate / 60:.1f} min left" if total and rate else ""
                    self._console.print(text + left)
