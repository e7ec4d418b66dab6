"""The progress bar of a run on a terminal, and plain lines where there is none."""

import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ecdit.callbacks import Callback

if TYPE_CHECKING:
    from ecdit.train import Trainer

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar(Callback):
    """Loss, images/s, MFU and time left, on standard error."""

    def __init__(self):
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._told = 0.0

    def on_start(self, trainer: "Trainer") -> None:
        self._first, self._began = trainer.progress.step, time.monotonic()
        if self.console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task("", total=trainer.recipe.train.steps, completed=trainer.progress.step)
            self._bar.start()

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        text = f"loss {record['loss']:.4f}  {record['images_per_s']:.1f} images/s  MFU {record['mfu']:.1%}"
        if record["skipped"]:
            text += f"  {record['skipped']} skipped"
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
            return
        steps, now = trainer.recipe.train.steps, time.monotonic()
        if now - self._told >= SECONDS_BETWEEN_LINES or record["step"] == steps:
            self._told = now
            left = (now - self._began) / (record["step"] - self._first) * (steps - record["step"])
            self.console.print(f"step {record['step']}/{steps}  {text}  {left / 60:.1f} min left")

    def on_message(self, message: str) -> None:
        self.console.print(message, markup=False)

    def on_end(self, trainer: "Trainer") -> None:
        if self._bar is not None:
            self._bar.stop()
