"""Runs of tiny models for tests of what reads runs: trained here in seconds, or random, with a checkpoint."""

from pathlib import Path

from ecdit import load_recipe
from ecdit.callbacks.metrics import JsonLines
from ecdit.data.prepare import prepare_shapes
from ecdit.recipe_io import change_recipe, dump_recipe
from ecdit.run import Run
from ecdit.train import DONE, train
from parallel import topology
from parallel.checkpoint.folder import Keep
from parallel.checkpoint.store import CheckpointStore
from parallel.topology import Layout
from tests.layouts import Case, build
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[1]
TINY = [
    "model.layers=2", "model.width=32", "model.heads=2", "model.kv_heads=2", "model.experts=4",
    "model.group_tokens=256", "model.text_width=16", "train.batch=8", "train.micro_batch=4", "train.steps=8",
    "optimizer.warmup=2", "log.tensorboard=false", "sample.steps=4", "checkpoint.every=100",
    "checkpoint.asynchronous=false",
]  # fmt: skip


def make_shapes(folder: Path) -> Path:
    """Forty pictures."""
    prepare_shapes(folder / "shapes", count=40, seed=0)
    return folder / "shapes"


def make_run(shapes: Path, runs: Path, *overrides: str) -> Path:
    """Trains the quickstart's recipe, made tiny, and returns the run's folder."""
    data = f"data.streams=[{{path: {shapes}}}]"
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml", [*TINY, data, *overrides])
    assert train(recipe, runs, [JsonLines()]) == DONE
    return runs / recipe.run


def random_run(folder: Path, *overrides: str) -> Run:
    """The model of `tests.layouts`, every path of which carries a signal, for pictures of 8x8; a checkpoint, no log."""
    small = ("sample.steps=3", "sample.guidance=2.0")
    recipe = change_recipe(Case(Layout(), ranks=1).recipe(), (*small, *overrides), "tiny")
    run = Run(folder)
    run.write_recipe(recipe)
    run_on_ranks(save_checkpoint, 1, folder, 3)
    return run


def save_checkpoint(folder: Path, step: int) -> None:
    """A checkpoint of random weights."""
    run = Run(folder)
    recipe = run.recipe()
    place = topology.start(Layout(), 1)
    case = Case(Layout(), ranks=1, model=tuple(recipe.model.model_dump().items()))
    _, engine = build(case, place)
    store = CheckpointStore(run.checkpoints, place, Keep(3), asynchronous=False, timeout_minutes=1)
    meta = {"updates": step, "skipped": 0, "samples": 0, "optimizer": "rmsprop_momentum", "recipe": dump_recipe(recipe)}
    store.save(step, engine.state(), meta)
    topology.stop()
