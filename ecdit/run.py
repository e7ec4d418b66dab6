"""The folder of a run: its resolved recipe, metrics, checkpoints and samples."""

from pathlib import Path

import yaml

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from ecdit.recipe_io import dump_recipe, load_recipe
from parallel import checkpoint
from parallel.checkpoint import Checkpoint


class Run:
    """`runs/NAME/`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.metrics_file = folder / "metrics.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.samples = folder / "samples"

    def log_file(self, rank: int) -> Path:
        """Where a rank other than the first writes."""
        return self.folder / "logs" / f"rank-{rank}.log"

    def recipe(self) -> Recipe:
        """The recipe that the run was last started with. Raises UserError where the folder is no run."""
        if not self.recipe_file.exists():
            raise UserError(f"{self.folder}: no run here: {self.recipe_file.name} is missing; `ecdit train` makes one")
        return load_recipe(self.recipe_file)

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes the resolved recipe, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.recipe_file.with_suffix(".partial")
        aside.write_text(dump_recipe(recipe), encoding="utf-8")
        aside.replace(self.recipe_file)

    def newest_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and messages on broken ones, which are set aside."""
        return checkpoint.newest(self.checkpoints)


def check_same_model(recipe: Recipe, saved: Checkpoint) -> None:
    """Refuses a checkpoint whose model, or whose way to an identical continuation, is another one.

    Raises UserError with every differing key.
    """
    ours, theirs = recipe.model.model_dump(mode="json"), yaml.safe_load(saved.meta["recipe"])["model"]
    differing = [
        f"  model.{key}: {ours.get(key)!r} in the recipe, {theirs.get(key)!r} in the checkpoint"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if recipe.optimizer.name != saved.meta["optimizer"]:
        differing.append(
            f"  optimizer.name: {recipe.optimizer.name!r} in the recipe, {saved.meta['optimizer']!r} in the checkpoint"
        )
    if differing:
        raise UserError(
            f"{saved.folder} is a checkpoint of another model; choose another name for `run`, or make these agree:\n"
            + "\n".join(differing)
        )
