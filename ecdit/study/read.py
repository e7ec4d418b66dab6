"""What a study reads of its runs' folders.

Shapes: `V` evaluations of the held-out loss, `P` held-out pictures.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ecdit.callbacks.metrics import read_steps
from ecdit.evaluate.held import place_of
from ecdit.evaluate.suites import scores_file
from ecdit.run import Run
from ecdit.status import read_status
from ecdit.study.plan import Study, StudyRun
from parallel.checkpoint.folder import committed, step_of

# what a run may change on its way and a comparison may not: the held-out pictures, and how scored ones are drawn
JUDGED_BY = ("log.held_out.path", "log.held_out.pictures")
JUDGED_BY += ("sample.steps", "sample.solver", "sample.guidance", "sample.shift")


@dataclass(frozen=True)
class Judged:
    """A picture of the shapes suite: what was asked for, and whether it shows that."""

    task: str
    prompt: str
    path: Path
    right: bool


class RunResult:
    """One run, read at `step` (later steps are left out)."""

    def __init__(self, run: StudyRun, folder: Path, step: int):
        self.run, self.step = run, step
        self.place = Run(folder / run.name)

    @property
    def trained(self) -> int:
        """Steps of the newest checkpoint."""
        found = committed(self.place.checkpoints)
        return step_of(found[-1]) if found else 0

    def check(self) -> None:
        """Raises UserError where what is there was trained or judged on other terms than those that are asked for. What
        has no checkpoint begins anew, on any."""
        if self.trained or self.is_compared:
            self.place.check_started_with(self.run.recipe, "name another folder with --runs", JUDGED_BY)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return read_steps(self.place.metrics_file, self.step)

    @cached_property
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps (V,), and each picture's loss (V, P); evaluations that are not whole are left out."""
        file = self.place.held_out_file
        steps = [record["step"] for record in read_steps(file, self.step)]
        rows = {step: file.with_suffix("") / f"step-{step}.npy" for step in steps}
        rows = {step: path for step, path in rows.items() if path.exists()}
        return np.array(sorted(rows)), np.array([np.load(rows[step]) for step in sorted(rows)], np.float64)

    @property
    def is_compared(self) -> bool:
        """Whether its held-out loss at the step is there."""
        steps = self.held_out[0]
        return bool(len(steps)) and int(steps[-1]) == self.step

    @property
    def scores_file(self) -> Path:
        """Of the shapes suite."""
        return scores_file(self.place, "shapes", self.step)

    @property
    def trace(self) -> Path:
        """The suite's list of its pictures."""
        return place_of(self.place, self.step) / "shapes.jsonl"

    @cached_property
    def judged(self) -> list[Judged]:
        """The pictures of the shapes suite, in its order; none where it is not scored at the step."""
        if not self.scores_file.exists() or not self.trace.exists():
            return []
        lines = [json.loads(line) for line in self.trace.read_text(encoding="utf-8").splitlines()]
        pictures = self.trace.parent / "pictures"
        return [Judged(line["task"], line["prompt"], pictures / line["file"], bool(line["right"])) for line in lines]

    @property
    def analysis(self) -> Path | None:
        """Folder of what `ecdit analyze` found."""
        folder = self.place.folder / "analysis"
        return folder if (folder / "analysis.json").exists() else None

    def layers(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and a number a MoE layer at each, of the metrics that are one."""
        found = [(record["step"], record[key]) for record in self.metrics if record.get(key)]
        return np.array([step for step, _ in found]), np.array([values for _, values in found])

    def median(self, key: str) -> float:
        """Of the logged steps, without the first tenth, in which kernels are compiled and caches filled."""
        values = [r[key] for r in self.metrics if isinstance(r.get(key), int | float)]
        return float(np.median(values[len(values) // 10 :])) if values else float("nan")

    @property
    def state(self) -> str:
        """Where it stands, for the reader."""
        if self.is_compared:
            return "compared"
        if not self.trained and not self.metrics:
            return "not begun"
        why = read_status(self.place.folder)
        told = f": {why['why']}" if why.get("state") == "failed" and why.get("why") else ""
        return f"{why.get('state', 'begun')}, {self.trained:,} of {self.step:,} steps{told}"


def results_of(study: Study) -> Iterator[RunResult]:
    """Of all variants and seeds, also of those that are not to be run now."""
    steps, plan = study.runs[0].recipe.train.steps, study.plan
    for name in (*plan.main, *plan.others):
        for seed in sorted({*study.seeds, *range(plan.seeds)}):
            yield RunResult(study.run_of(name, seed), study.folder, steps)
