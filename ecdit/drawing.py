"""Draws many pictures into a folder: shared by the ranks, resumed where it was left, each with what it was drawn from.

A picture is a function of the checkpoint, the prompt, the seed and the settings. Its PNG says them all, so that one
that is there and says the same is not drawn again.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ecdit.pictures import read_text, save_picture, slug
from ecdit.prompts import Request
from ecdit.recipe import SampleRecipe
from ecdit.sampling import Sampler
from ecdit.sampling_job import precision_of
from ecdit.terminal import console
from parallel.topology import Topology

SECONDS_BETWEEN_LINES = 10.0
ROUND = 16  # pictures that a rank draws, at least, before it writes them


def path_of(request: Request, folder: Path) -> Path:
    """Where a picture is kept; no two prompts and seeds share a place."""
    return folder / f"{slug(request.prompt)}-{request.seed}.png"


def text_of(request: Request, settings: SampleRecipe, checkpoint: str, precision: str) -> dict[str, str]:
    """All that a picture depends on, as its PNG has it."""
    values = {"prompt": request.prompt, "seed": request.seed, "checkpoint": checkpoint, "precision": precision}
    return {key: str(value) for key, value in (values | settings.model_dump()).items()}


def draw_all(
    sampler: Sampler,
    checkpoint: str,
    requests: Sequence[Request],
    settings: SampleRecipe,
    folder: Path,
    place: Topology,
    source: str,
) -> list[Path]:
    """The path of each picture, all of them drawn; called by all ranks alike. `source` goes into the PNGs too.

    Raises OSError where the folder cannot be written.
    """
    texts = {
        path_of(request, folder): text_of(request, settings, checkpoint, precision_of(sampler.recipe))
        for request in requests
    }
    wanted = {path_of(request, folder): request for request in requests}
    pending = place.everyones([p for p in wanted if not _is_drawn(p, texts[p])] if place.first else None)[0]
    folder.mkdir(parents=True, exist_ok=True)
    at_once = max(ROUND, settings.batch) * place.data_ranks
    with PictureProgress(len(wanted), len(wanted) - len(pending), shown=place.first) as progress:
        for first in range(0, len(pending), at_once):
            part = pending[first : first + at_once]
            own = share(part, place.data_rank, place.data_ranks)
            written = alone(part, place.data_rank, place.data_ranks) if place.speaks else []
            samples = sampler.draw([wanted[p].prompt for p in own], [wanted[p].seed for p in own], settings)
            for path, image in zip(written, samples.images, strict=False):
                save_picture(image, path, texts[path] | {"source": source, "drawn_on": str(place.layout)})
            progress.advance(len(part))
    place.everyones(None)  # every rank's pictures are there
    return [path_of(request, folder) for request in requests]


def alone(items: list, rank: int, ranks: int) -> list:
    """A rank's contiguous part, which no other rank has."""
    each = -(-len(items) // ranks)
    return items[rank * each : (rank + 1) * each]


def share(items: list, rank: int, ranks: int) -> list:
    """The same, and equally many for all, for ranks that share experts compute in step: where there are too few, the
    last item is repeated, and drawn again to the same picture."""
    part = alone(items, rank, ranks)
    return part + items[-1:] * (-(-len(items) // ranks) - len(part))


def _is_drawn(path: Path, text: dict[str, str]) -> bool:
    return path.exists() and text.items() <= read_text(path).items()


class PictureProgress:
    """A bar with pictures/s and the time left on a terminal; elsewhere a line now and then."""

    def __init__(self, total: int, done: int, *, shown: bool):
        self._total, self._done, self._drawn, self._shown = total, done, 0, shown
        self._began = self._told = time.monotonic()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if shown and console.is_terminal else None

    def __enter__(self) -> "PictureProgress":
        if self._shown and self._done:
            console.print(f"{self._done} of {self._total} pictures are there already")
        if self._bar is not None:
            self._task = self._bar.add_task("", total=self._total, completed=self._done)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, pictures: int) -> None:
        """So many more are drawn."""
        self._done, self._drawn, now = self._done + pictures, self._drawn + pictures, time.monotonic()
        rate = f"{self._drawn / max(now - self._began, 1e-9):.2f} pictures/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=rate)
        elif self._shown and (now - self._told >= SECONDS_BETWEEN_LINES or self._done == self._total):
            self._told = now
            console.print(f"{self._done}/{self._total} pictures  {rate}")
