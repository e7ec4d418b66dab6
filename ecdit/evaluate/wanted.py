"""Evaluations that a training run asks for: of which steps, and by which command."""

import json
from dataclasses import fields
from pathlib import Path

from ecdit.errors import UserError
from ecdit.evaluate.suite import Options
from ecdit.evaluate.suites import SUITES, scores_file
from ecdit.recipe import Recipe
from ecdit.run import Run
from ecdit.sampling_job import change_for_sampling
from parallel.topology import Layout, LayoutError

OPTIONS = [field.name for field in fields(Options) if field.name != "folder"]
NUMBERS = {"n": 1, "seed": 0}  # and the least that each may be
PATHS = {field.name for field in fields(Options) if "Path" in str(field.type)}


def check(recipe: Recipe, run: Run) -> None:
    """Raises UserError, naming the key, where an evaluation would be refused for what the recipe says of it."""
    wanted = recipe.evaluation
    for name in wanted.options:
        if name not in OPTIONS:
            raise UserError(f"evaluation.options: {name!r} is not known; valid: {', '.join(OPTIONS)}")
        value = wanted.options[name]
        if name in NUMBERS and (not isinstance(value, int) or value < NUMBERS[name]):
            raise UserError(f"evaluation.options: {name}: {value!r} is no whole number from {NUMBERS[name]} on")
    values = {name: Path(value) if name in PATHS else value for name, value in wanted.options.items()}
    try:
        drawn = change_for_sampling(recipe, wanted.keys, "evaluation.keys")
        sizes = drawn.parallel
        Layout(sizes.tensor, sizes.expert, sizes.expert_tensor, sizes.pipeline, sizes.sequence).check(wanted.tasks)
    except (UserError, LayoutError) as error:
        raise UserError(f"evaluation.keys: {error} (evaluation.tasks: {wanted.tasks})") from None
    for name in wanted.suites:
        try:
            SUITES[name](Options(run.folder / "evaluate", **values), drawn)
        except UserError as error:
            raise UserError(f"evaluation.options: {error}") from None


def is_due(recipe: Recipe, step: int) -> bool:
    """Whether the checkpoint of a step is to be evaluated."""
    every = recipe.evaluation.every
    return bool(every) and (step % every == 0 or step == recipe.train.steps)


def is_done(recipe: Recipe, run: Run, step: int) -> bool:
    """Whether all of its scores are there."""
    return all(scores_file(run, name, step).exists() for name in recipe.evaluation.suites)


def arguments(recipe: Recipe, run: Run, step: int) -> list[str]:
    """Of `ecdit`."""
    wanted = recipe.evaluation
    given = [(f"--{name.replace('_', '-')}" if name != "n" else "-n", str(v)) for name, v in wanted.options.items()]
    chosen = [("--suite", ",".join(wanted.suites)), ("--step", str(step)), *given]
    return ["evaluate", str(run.folder), *wanted.keys, *(word for pair in chosen for word in pair)]


def outcome(recipe: Recipe, run: Run, step: int) -> str:
    """What was found, in a line."""
    numbers = []
    for name in recipe.evaluation.suites:
        scores = json.loads(scores_file(run, name, step).read_text(encoding="utf-8"))
        chosen = {k: v for k, v in scores.items() if isinstance(v, float)}
        numbers += [f"{name} {key} {value:.4g}" for key, value in chosen.items()]
    return ", ".join(numbers)
