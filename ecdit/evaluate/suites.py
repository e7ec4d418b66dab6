"""The suites of `ecdit evaluate`: draws what they ask for, lets them judge, and keeps what traces a score to it."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ecdit.drawing import draw_all
from ecdit.errors import UserError
from ecdit.evaluate.clip import ClipSuite
from ecdit.evaluate.dsg import DsgSuite
from ecdit.evaluate.fid import FidSuite
from ecdit.evaluate.geneval import GenEvalSuite
from ecdit.evaluate.paper import figures
from ecdit.evaluate.parti import PartiSuite
from ecdit.evaluate.samples import SamplesSuite
from ecdit.evaluate.shapes import ShapesSuite
from ecdit.evaluate.suite import Options, Row, Suite
from ecdit.pictures import digest
from ecdit.run import Run
from ecdit.sampling_job import joined, open_sampler, precision_of, sampling_recipe
from ecdit.whole import whole

SUITES: dict[str, type[Suite]] = {
    "samples": SamplesSuite,
    "shapes": ShapesSuite,
    "fid": FidSuite,
    "clip": ClipSuite,
    "geneval": GenEvalSuite,
    "dsg": DsgSuite,
    "parti": PartiSuite,
}


def names_of(text: str) -> list[str]:
    """Suites from "fid,clip". Raises UserError for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in SUITES:
            raise UserError(f"--suite: {name!r} is not known; valid: {', '.join(SUITES)}")
    return names


def scores_file(run: Run, name: str, step: int | None) -> Path:
    """A suite's scores: of the checkpoint that was the newest, or of a step's."""
    return run.folder / (f"evaluate-{name}.json" if step is None else f"evaluate-{name}-step-{step}.json")


def evaluate(
    run: Run, names: Sequence[str], options: Options, overrides: Sequence[str], step: int | None = None
) -> dict[str, dict[str, Any]]:
    """The scores of each suite, which also become JSON files; none on ranks other than the first.

    All pictures are drawn before any is judged, by all ranks; then the others leave. Raises UserError.
    """
    recipe = sampling_recipe(run, overrides)
    suites = {name: SUITES[name](options, recipe) for name in names}
    settings = recipe.sample
    with joined(recipe, run) as place:
        first = place.first
        for suite in suites.values() if first else ():
            suite.load()
        sampler, source = open_sampler(run, recipe, place, step)
        folder = options.folder / "pictures"
        pictures = {
            name: draw_all(sampler, str(source), suite.requests(), settings, folder, place, str(run.folder))
            for name, suite in suites.items()
        }
        del sampler  # the judges need its memory, one of them in a process of its own
        gc.collect()
        torch.cuda.empty_cache()
    if not first:
        return {}
    drawn = {"step": source.step, "checkpoint": str(source), "precision": precision_of(recipe)}
    drawn |= {"settings": settings.model_dump(), "seed": options.seed}
    return {
        name: _judge(name, suite, pictures[name], drawn, scores_file(run, name, step), options.folder)
        for name, suite in suites.items()
    }


def _judge(
    name: str, suite: Suite, pictures: list[Path], drawn: dict[str, Any], file: Path, folder: Path
) -> dict[str, Any]:
    """Judges, and writes the scores and what each picture is: a file that `ecdit sample --prompts` draws again."""
    judgement = suite.judge(pictures)
    trace = folder / f"{name}.jsonl"
    with trace.open("w", encoding="utf-8") as lines:
        for request, path, detail in zip(suite.requests(), pictures, judgement.details, strict=True):
            known = {"prompt": request.prompt, "seed": request.seed, "file": path.name, "xxh64": digest(path)}
            lines.write(json.dumps(known | detail) + "\n")
    paper = {key: vars(figure) for key, figure in figures(name).items()}
    scores = judgement.scores | drawn | {"trace": str(trace)} | ({"paper": paper} if paper else {})
    with whole(file) as aside:
        aside.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    return scores


def as_table(name: str, scores: dict[str, Any], rows: list[Row]) -> Table:
    """A suite's scores for a terminal, the paper's beside them where it prints any."""
    paper = figures(name)
    table = Table(name, box=None, header_style="bold")
    table.add_column("ours", justify="right")
    table.add_column("pictures", justify="right")
    if paper:
        table.add_column("paper", justify="right")
    for row in rows:
        known = [paper[row.key].value if row.key in paper else ""] if paper else []
        table.add_row(row.name, row.value, row.pictures, *known)
    return table
