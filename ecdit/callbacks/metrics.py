"""Metrics of a run as files: metrics.jsonl, TensorBoard, and Weights & Biases where asked for."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecdit.callbacks import Callback
from ecdit.errors import UserError
from ecdit.whole import whole

if TYPE_CHECKING:
    from ecdit.train import Trainer


class JsonLines(Callback):
    """`metrics.jsonl`: one object a logged step. Lines of steps that a resume repeats are taken out first."""

    def on_start(self, trainer: "Trainer") -> None:
        path = trainer.run.metrics_file
        if path.exists():
            keep_until(path, trainer.progress.step)
        self._file = path.open("ab", buffering=0)
        self._torn = False

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if record["logged"]:
            plain = {key: _plain(value) for key, value in record.items() if key != "logged"}
            # a line that a full disk cut short is ended before the next one, so that no other is lost with it
            line = ("\n" if self._torn else "") + json.dumps(plain, allow_nan=False) + "\n"
            self._torn = True
            self._torn = self._file.write(line.encode()) != len(line)

    def on_end(self, trainer: "Trainer") -> None:
        self._file.close()


class TensorBoard(Callback):
    """Scalars under `tensorboard/`; a list, such as one number a MoE layer, becomes one scalar for each."""

    def on_start(self, trainer: "Trainer") -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(trainer.run.folder / "tensorboard", purge_step=trainer.progress.step + 1)

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if record["logged"]:
            for name, value in scalars(record):
                self._writer.add_scalar(name, value, record["step"])

    def on_end(self, trainer: "Trainer") -> None:
        self._writer.close()


class Wandb(Callback):
    """The same scalars on Weights & Biases. Raises UserError where the package is missing."""

    def __init__(self, project: str):
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"log.wandb: {project!r} needs the package wandb; install the extra `ecdit[wandb]`, or set it to null"
            ) from None
        self._wandb, self._project = wandb, project

    def on_start(self, trainer: "Trainer") -> None:
        self._run = self._wandb.init(
            project=self._project,
            name=trainer.recipe.run,
            id=trainer.recipe.run,
            dir=trainer.run.folder,
            resume="allow",
            config=trainer.recipe.model_dump(mode="json"),
        )

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if record["logged"]:
            self._run.log(dict(scalars(record)), step=record["step"])

    def on_end(self, trainer: "Trainer") -> None:
        self._run.finish()


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, number) pairs of a record."""
    for key, value in record.items():
        if key in ("step", "logged", "sample_ids"):
            continue
        if isinstance(value, list):
            yield from ((f"{key}/{layer}", number) for layer, number in enumerate(value))
        else:
            yield key, value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that has one a step or a picture. One that a crash or a full disk cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):  # what is left of a line may be a number
            records.append(record)
    return records


def read_steps(path: Path, last: float = math.inf) -> list[dict[str, Any]]:
    """The lines of steps up to `last`; none where there is no file. What tells no step, as a damaged line may, is left
    out."""
    records = read_metrics(path) if path.exists() else []
    return [record for record in records if "step" in record and record["step"] <= last]


def keep_until(path: Path, step: int) -> None:
    """Takes out lines after `step`, in a file that is whole at every moment."""
    kept = [json.dumps(record) + "\n" for record in read_steps(path, step)]
    with whole(path) as aside:
        aside.write_text("".join(kept), encoding="utf-8")


def _plain(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
