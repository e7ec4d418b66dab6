"""The shapes suite: prompts of the embedded data set's grammar, and whether a picture shows what its prompt states.

GenEval's six tasks and digits; a task's score is the share of its pictures that are right, the overall score the mean
over GenEval's six, as GenEval has it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecdit.data.shapes import RELATIONS, TASKS, Scene, make_task
from ecdit.data.shapes_draw import COLORS, SHAPES
from ecdit.errors import UserError
from ecdit.evaluate.detect import Found, detect
from ecdit.evaluate.suite import Judgement, Options, Row
from ecdit.pictures import read_pixels
from ecdit.prompts import Request, repeat
from ecdit.recipe import Recipe

GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CLEAR = 3.0  # pixels that make one object stand beside another


@dataclass(frozen=True)
class Prompt:
    """A caption and the scene that a picture of it must show."""

    caption: str
    scene: Scene


class ShapesSuite:
    """See `ecdit.evaluate.suite.Suite`. `n`: pictures of each task, 50 if not given, each of a prompt of its own."""

    def __init__(self, options: Options, recipe: Recipe):
        resolution = recipe.data.resolution
        if resolution != 32:
            raise UserError(f"--suite shapes: judges pictures of 32x32; data.resolution of this run is {resolution}")
        self._seed, self._prompts = options.seed, suite(options.n or 50, options.seed)

    def requests(self) -> list[Request]:
        """One picture a prompt."""
        return repeat([prompt.caption for prompt in self._prompts], 1, self._seed)

    def load(self) -> None:
        """Nothing is learned here."""

    def judge(self, pictures: list[Path]) -> Judgement:
        """Whether each shows what its prompt states."""
        images = np.stack([read_pixels(path).numpy() for path in pictures])
        right = [
            {"task": prompt.scene.task, "right": shows(things, prompt.scene)}
            for things, prompt in zip(detect(images), self._prompts, strict=True)
        ]
        return Judgement(score(images, self._prompts), right)

    @staticmethod
    def rows(scores: dict[str, Any]) -> list[Row]:
        """A task a row, GenEval's mean, and one object's colour and shape apart."""
        counts = scores["pictures_a_task"]
        rows = [Row(task, f"{share:.1%}", str(counts[task])) for task, share in scores["tasks"].items()]
        rows.append(Row("overall", f"{scores['overall']:.1%}"))
        for name in ("single_object_color", "single_object_shape"):
            apart = scores[name]
            rows.append(Row(name.replace("_", " "), f"{apart['accuracy']:.1%}", f"chance {apart['chance']:.1%}"))
        return rows


def suite(n: int, seed: int) -> list[Prompt]:
    """`n` prompts of each task. Their pictures are drawn apart from those of the training data."""
    prompts = []
    for number, task in enumerate(TASKS):
        for index in range(n):
            words = np.random.SeedSequence((seed, index, number, 0x5EED))
            sample = make_task(task, np.random.Generator(np.random.PCG64(words)))
            prompts.append(Prompt(sample.caption, sample.scene))
    return prompts


def score(images: np.ndarray, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Scores of pictures (N, 32, 32, 3) uint8, one for each prompt; for one object also its colour and shape apart."""
    found = detect(images)
    right: dict[str, list[bool]] = {task: [] for task in TASKS}
    colors, shapes = [], []
    for things, prompt in zip(found, prompts, strict=True):
        scene = prompt.scene
        right[scene.task].append(shows(things, scene))
        if scene.task == "colors":
            colors.append(bool(things) and things[0].color == scene.stated[0]["color"])
            shapes.append(bool(things) and things[0].kind == scene.stated[0]["shape"])
    tasks = {task: _share(results) for task, results in right.items()}
    return {
        "suite": "shapes",
        "overall": sum(tasks[task] for task in GENEVAL) / len(GENEVAL),
        "tasks": tasks,
        "pictures_a_task": {task: len(results) for task, results in right.items()},
        "single_object_color": {"accuracy": _share(colors), "chance": 1 / len(COLORS)},
        "single_object_shape": {"accuracy": _share(shapes), "chance": 1 / len(SHAPES)},
    }


def shows(things: Sequence[Found], scene: Scene) -> bool:
    """Whether the pieces found in a picture are what the caption of the scene states."""
    if scene.task == "digits":
        row = sorted(things, key=lambda thing: thing.x)
        return "".join(t.kind for t in row) == scene.digits and all(t.color == scene.digits_color for t in row)
    matching = [[thing for thing in things if _is(thing, stated)] for stated in scene.stated]
    if scene.task == "counting":
        return len(matching[0]) == len(scene.objects) == len(things)
    if scene.relation:
        return any(_stands(a, b, scene.relation) for a in matching[0] for b in matching[1])
    return all(matching)


def _is(thing: Found, stated: dict[str, str]) -> bool:
    seen = {"shape": thing.kind, "color": thing.color, "size": thing.size}
    return all(seen[word] == value for word, value in stated.items())


def _stands(a: Found, b: Found, relation: str) -> bool:
    x, y = RELATIONS[relation]
    return (a.x - b.x) * x + (a.y - b.y) * y >= CLEAR


def _share(results: Sequence[bool]) -> float:
    return sum(results) / len(results) if results else float("nan")
