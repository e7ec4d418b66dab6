"""The folder of a run: its resolved recipe, metrics, checkpoints and samples."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from ecdit.recipe_io import dump_recipe, load_recipe, parse_recipe
from ecdit.terminal import console
from ecdit.whole import whole
from parallel.checkpoint import folder as checkpoints
from parallel.checkpoint.folder import Checkpoint

MOST_NAMED = 8  # runs, where a folder is none


class Run:
    """`runs/NAME/`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.recipe_file = folder / "recipe.yaml"
        self.metrics_file = folder / "metrics.jsonl"
        self.collectives_file = folder / "collectives.json"
        self.held_out_file = folder / "held-out.jsonl"
        self.checkpoints = folder / "checkpoints"
        self.samples = folder / "samples"

    def log_file(self, rank: int) -> Path:
        """Where a rank other than the first writes."""
        return self.folder / "logs" / f"rank-{rank}.log"

    def recipe(self) -> Recipe:
        """The recipe that the run was last started with. Raises UserError where the folder is no run."""
        if not self.recipe_file.exists():
            raise UserError(f"{self.folder}: no run here: {self._why_none()}")
        return load_recipe(self.recipe_file)

    def _why_none(self) -> str:
        """With the runs that are near, where there are any."""
        is_folder = self.folder.is_dir()
        why = f"{self.recipe_file.name} is missing" if is_folder else "there is no such folder"
        near = [*self.folder.glob(f"*/{self.recipe_file.name}"), *self.folder.parent.glob(f"*/{self.recipe_file.name}")]
        runs = sorted(str(file.parent) for file in near)[:MOST_NAMED]
        return f"{why}; valid: {', '.join(runs)}" if runs else f"{why}; `ecdit train` makes one"

    def write_recipe(self, recipe: Recipe) -> None:
        """Writes the resolved recipe, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(self.recipe_file) as aside:
            aside.write_text(dump_recipe(recipe), encoding="utf-8")

    def check_started_with(self, recipe: Recipe, otherwise: str, also: Sequence[str] = ()) -> None:
        """Raises UserError with every key that is another one in the run's recipe, but for those that a run may change
        on its way. also: beginnings of keys that count nevertheless; otherwise: what to do but to remove the run."""
        changed = differing(recipe.model_dump(mode="json"), self.recipe().model_dump(mode="json"))
        lines = [
            f"  {key}: {theirs!r} in the run, {ours!r} asked for"
            for key, (ours, theirs) in changed.items()
            if key.startswith(tuple(also)) or not key.startswith(HARMLESS)
        ]
        if lines:
            told = f"{self.folder}: this run was started with other keys than are asked for; make these agree"
            raise UserError("\n".join([f"{told}, {otherwise}, or remove {self.folder}:", *lines]))

    def newest_checkpoint(self) -> Checkpoint:
        """The newest checkpoint that verifies; tells of broken ones that are newer. Raises UserError where there is
        none, or it is another model's."""
        saved, broken = checkpoints.newest(self.checkpoints)
        if saved is None:
            raise self.no_checkpoint(broken)
        self.tell_of(broken, saved)
        self.check_model(saved)
        return saved

    def check_model(self, saved: Checkpoint) -> None:
        """Raises UserError where the run's recipe describes another model than the checkpoint is of."""
        fatal = [line for key, line in _told(self.recipe(), saved).items() if key.startswith("model.")]
        if fatal:
            lines = "\n".join(f"  {line}" for line in fatal)
            raise UserError(f"{saved.folder} is of another model than {self.recipe_file}; make these agree:\n{lines}")

    def no_checkpoint(self, broken: list[str]) -> UserError:
        """What to raise where there is none but those, a message each."""
        told = "no other checkpoint" if broken else "no checkpoint yet; `ecdit train` makes one"
        return UserError("\n".join([*broken, f"{self.checkpoints}: {told}"]))

    @staticmethod
    def tell_of(broken: list[str], taken: Checkpoint) -> None:
        """That another checkpoint than the newest is taken, and why."""
        for message in broken:
            console.print(f"{message}; {taken.folder.name} is taken", markup=False)


# what a run may change on its way; all else decides the model, or which samples and noise it meets
HARMLESS = ("run", "checkpoint.", "log.", "sample.", "evaluation.", "parallel.", "data.workers", "cluster.")
HARMLESS += (
    "data.cache.",
    "data.shard_encoders",
    "engine_options.",
    "train.compile",
    "train.graph",
    "train.steps",
    "train.micro_batch",
    "train.linears",
    "train.precision",
    "train.recompute",
)


def check_same_model(recipe: Recipe, saved: Checkpoint) -> list[str]:
    """What the recipe changes of the one that the checkpoint was made with, one sentence each, for the user.

    Raises UserError with every differing key where the model is another one, or the optimizer's states are.
    """
    told = _told(recipe, saved)
    fatal = [line for key, line in told.items() if key.startswith("model.") or key == "optimizer.name"]
    if fatal:
        raise UserError(
            f"{saved.folder} is a checkpoint of another model; choose another name for `run`, or make these agree:\n"
            + "\n".join(f"  {line}" for line in fatal)
        )
    return [f"Goes on with another {line}." for key, line in told.items() if not key.startswith(HARMLESS)]


def _told(recipe: Recipe, saved: Checkpoint) -> dict[str, str]:
    """A sentence for each dotted key that is another one in the recipe that the checkpoint was made with."""
    changed = differing(recipe.model_dump(mode="json"), _with_defaults(saved.meta["recipe"]))
    return {key: f"{key}: {a!r} in the recipe, {b!r} in the checkpoint" for key, (a, b) in changed.items()}


def _with_defaults(text: str) -> dict[str, object]:
    """A checkpoint's recipe, with the defaults of keys that are younger than it."""
    values = yaml.safe_load(text)
    try:
        return parse_recipe(values, "a checkpoint").model_dump(mode="json")
    except UserError:  # of another version, in which something else was valid
        return values


def differing(ours: object, theirs: object) -> dict[str, tuple[object, object]]:
    """Both values of every dotted key in which two recipes, as plain values, differ."""
    ours, theirs = flat(ours), flat(theirs)
    pairs = {key: (ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys())}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flat(values: object, prefix: str = "") -> dict[str, object]:
    """Dotted keys of nested mappings; lists are values."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {key: value for name, part in values.items() for key, value in flat(part, f"{prefix}{name}.").items()}
