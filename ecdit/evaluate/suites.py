"""The suites of `ecdit evaluate`: each draws pictures from a run's averaged weights and scores them."""

from collections.abc import Callable
from typing import Any

from rich.table import Table

from ecdit.errors import UserError
from ecdit.evaluate.shapes import score, suite
from ecdit.run import Run
from ecdit.sampling import Sampler


def shapes(run: Run, n: int, seed: int) -> dict[str, Any]:
    """`n` pictures for each task of the embedded data set. Raises UserError where pictures are not 32x32."""
    sampler = Sampler.from_run(run)
    resolution = sampler.recipe.data.resolution
    if resolution != 32:
        raise UserError(f"--suite shapes: judges pictures of 32x32; data.resolution of this run is {resolution}")
    prompts = suite(n, seed)
    settings = sampler.recipe.sample
    seeds = [seed * len(prompts) + i for i in range(len(prompts))]
    drawn = sampler.draw([prompt.caption for prompt in prompts], seeds, settings)
    return score(drawn.images.numpy(), prompts) | {"settings": settings.model_dump(), "seed": seed}


SUITES: dict[str, Callable[[Run, int, int], dict[str, Any]]] = {"shapes": shapes}


def as_table(scores: dict[str, Any]) -> Table:
    """A suite's scores for a terminal."""
    table = Table("task", box=None, header_style="bold")
    for column in ("right", "pictures"):
        table.add_column(column, justify="right")
    for task, share in scores["tasks"].items():
        table.add_row(task, f"{share:.1%}", str(scores["pictures_a_task"][task]))
    table.add_row("overall", f"{scores['overall']:.1%}", "")
    for name in ("single_object_color", "single_object_shape"):
        apart = scores[name]
        table.add_row(name.replace("_", " "), f"{apart['accuracy']:.1%}", f"chance {apart['chance']:.1%}")
    return table
