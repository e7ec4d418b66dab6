"""What a report reads of a run's folder: metrics, scores, pictures with their prompt and seed.

Shapes: `R` logged steps.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ecdit.callbacks.metrics import read_metrics
from ecdit.errors import UserError
from ecdit.run import Run, flat

NEEDED = ("step", "loss")
STEP_IN_NAME = re.compile(r"[-@](?:step-)?(\d+)$")
# of a score file: what says how it was made, not how good the pictures were
NO_SCORES = ("settings", "seed", "step", "samples", "updates", "prompts", "pictures", "pictures_a_task", "paper")
NO_SCORES += ("reference_pictures", "of")
COUNTS = ("pictures", "prompts", "asked")  # of a task or a category: how many its score is of
OF_THE_RUN = ("checkpoint", "drawn_on")  # settings of a picture that are never those of another run's


@dataclass(frozen=True)
class Scores:
    """One evaluate-*.json: its suite, the step that it was made at (None: not told), its numbers by dotted name."""

    suite: str
    step: int | None
    numbers: dict[str, float]


@dataclass(frozen=True)
class Picture:
    """A PNG that `ecdit sample` wrote, and the settings that stand in it."""

    path: Path
    settings: dict[str, str]

    @property
    def comparable(self) -> dict[str, str]:
        """The settings that pictures of several runs can have in common."""
        return {key: value for key, value in self.settings.items() if key not in OF_THE_RUN}


@dataclass(frozen=True)
class RunData:
    """name: what the page calls it. recipe: by dotted key. metrics: columns (R,), NaN where a line lacks the number.
    pictures: by (prompt, seed). drawn: by prompt and step, the first picture drawn of each while it trained."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    metrics: dict[str, np.ndarray]
    scores: list[Scores]
    pictures: dict[tuple[str, int], Picture]
    drawn: dict[str, dict[int, Path]]

    @property
    def steps(self) -> np.ndarray:
        """(R,)."""
        return self.metrics["step"]


def read_runs(folders: list[Path]) -> list[RunData]:
    """In the order given. Raises UserError for a folder that is no run, has logged nothing, or stands there twice."""
    whole = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, whole, strict=True):
        if whole.count(path) > 1:
            raise UserError(f"{folder}: this run stands twice among the runs to compare")
    names = [path.name for path in whole]
    return [
        _read(folder, path.name if names.count(path.name) == 1 else str(folder))
        for folder, path in zip(folders, whole, strict=True)
    ]


def _read(folder: Path, name: str) -> RunData:
    run = Run(folder)
    recipe = flat(run.recipe().model_dump(mode="json"))
    records = read_metrics(run.metrics_file) if run.metrics_file.exists() else []
    records = [record for record in records if all(key in record for key in NEEDED)]
    if not records:
        raise UserError(f"{run.metrics_file}: no logged step to report; `ecdit train` writes one every log.every steps")
    columns = {key: np.array([_float(record.get(key)) for record in records]) for key in _columns(records)}
    scores = [_scores(path) for path in sorted(folder.glob("evaluate-*.json"))]
    return RunData(name, folder, recipe, columns, scores, _pictures(run.samples), _drawn(folder / "evaluate"))


def _columns(records: list[dict[str, Any]]) -> list[str]:
    """Names of what is a number in some line, and of what every line has: a run may have no finite loss."""
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if name in NEEDED or any(isinstance(r.get(name), int | float) for r in records)]


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _scores(path: Path) -> Scores:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read these scores: {error}; delete it, or evaluate again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: scores are a mapping of names to numbers, found {type(found).__name__}")
    stem = path.stem.removeprefix("evaluate-")
    named = STEP_IN_NAME.search(stem)
    step = found.get("step", int(named[1]) if named else None)
    suite = str(found.get("suite", stem[: named.start()] if named else stem))
    numbers = {
        key: float(value)
        for key, value in flat({k: v for k, v in found.items() if k not in NO_SCORES}).items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and key.rsplit(".", 1)[-1] not in COUNTS
    }
    return Scores(suite, step if isinstance(step, int) else None, numbers)


def _pictures(folder: Path) -> dict[tuple[str, int], Picture]:
    """Those that say what they show; grids of training do not."""
    found = {}
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path) as image:  # reads no further than the header
                text = dict(image.text)
        except (OSError, SyntaxError):  # what PIL raises for a file that is no picture, or was cut short
            continue
        if "prompt" in text and text.get("seed", "").isdigit():
            settings = {key: value for key, value in text.items() if key not in ("prompt", "seed", "source")}
            found[text["prompt"], int(text["seed"])] = Picture(path, settings)
    return found


def _drawn(folder: Path) -> dict[str, dict[int, Path]]:
    """Of the evaluations' lists of samples, one a step."""
    found: dict[str, dict[int, Path]] = {}
    for trace in folder.glob("step-*/samples.jsonl"):
        step = trace.parent.name.removeprefix("step-")
        for known in read_metrics(trace):
            if not {"file", "prompt"} <= known.keys():
                continue
            picture = trace.parent / "pictures" / known["file"]
            if step.isdecimal() and picture.exists():
                found.setdefault(known["prompt"], {}).setdefault(int(step), picture)
    return found
