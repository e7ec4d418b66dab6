"""Sampling by the ranks of a job: their layout, the checkpoint loaded onto it, and how they end.

A run's checkpoint loads onto any layout, so that of the training does not matter here: ranks share the pictures, unless
`parallel.*` spreads the model over them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ecdit.assemble import assemble_model, check_libraries, start_topology
from ecdit.errors import UserError, explain
from ecdit.recipe import ParallelRecipe, Recipe
from ecdit.recipe_io import change_recipe
from ecdit.recipe_rules import FP8_MULTIPLE, rows_of_expert
from ecdit.run import Run
from ecdit.sampling import Sampler, batch_of
from parallel import topology
from parallel.checkpoint.boxes import Boxes
from parallel.checkpoint.folder import MANIFEST, Checkpoint, committed, describe, open_checkpoint, step_of, verify
from parallel.failure import together
from parallel.parameters import named_parameters
from parallel.topology import Topology

# what sampling may change of a run's recipe
FREE = ("parallel.", "sample.", "precision.", "train.precision", "train.linears")
# what is of the training or its hardware alone: a run of GPUs with all of these can be drawn from on a laptop
PLAIN = [
    "precision.fp8=none", "train.graph=false", "train.compile=false", "train.linears=torch", "train.recompute=none",
]  # fmt: skip


class Source(NamedTuple):
    """Of which checkpoint weights are: its step, and the xxh64 of its manifest, which has that of every file."""

    step: int
    digest: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.digest}"


def sampling_recipe(run: Run, overrides: Sequence[str]) -> Recipe:
    """The run's recipe without what only its training needed, every rank alone, and `key=value` overrides. Raises
    UserError for a key that is not free: the others decide the model."""
    return change_for_sampling(run.recipe(), overrides, str(run.recipe_file))


def change_for_sampling(recipe: Recipe, overrides: Sequence[str], source: str) -> Recipe:
    """The same of a recipe that is no run's yet; `source`: where it is from."""
    for override in overrides:
        if "=" in override and not override.startswith(FREE):
            raise UserError(
                f"{override!r}: this key belongs to the run, whose weights are drawn from; "
                f"valid here: {', '.join(f'{key}*' if key.endswith('.') else key for key in FREE)}"
            )
    alone = recipe.model_copy(update={"parallel": ParallelRecipe()})
    # a micro-batch is of training, but the rules hold it against the layout: the whole batch divides by what it did
    changed = change_recipe(alone, [*PLAIN, f"train.micro_batch={recipe.train.batch}", *overrides], source)
    if changed.train.precision == "fp64":
        for key, value in (("model.routing", changed.model.routing), ("train.linears", changed.train.linears)):
            if value in ("megatron_topk", "transformer_engine"):
                raise UserError(f"train.precision: fp64 does not go with {key}: {value}, which has none; try fp32")
    if changed.precision.fp8 != "none":
        _check_fp8(changed)
    return changed


def _check_fp8(recipe: Recipe) -> None:
    """Raises UserError where pictures would depend on each other, or products have dimensions that FP8 does not."""
    kind, batch = recipe.precision.fp8, batch_of(recipe.sample, recipe.parallel.tensor)
    if kind != "block":
        why = {"delayed": "training steps before it", "current": "the pictures that are drawn with it"}[kind]
        raise UserError(f"precision.fp8: {kind} would scale a picture's numbers by {why}; valid here: block, none")
    rows = rows_of_expert(recipe, 2 * batch * recipe.model.tokens) if recipe.model.grouped else 0
    if "experts" in recipe.precision.where and rows % FP8_MULTIPLE:
        raise UserError(
            f"sample.batch: {batch} pictures give an expert {rows:g} rows; precision.fp8 needs a multiple of "
            f"{FP8_MULTIPLE}"
        )


def precision_of(recipe: Recipe) -> str:
    """How numbers are rounded in drawing, as pictures and scores say it."""
    linears, fp8 = recipe.train.linears, recipe.precision
    named = [] if linears == "torch" else [linears]
    in_fp8 = [] if fp8.fp8 == "none" else [f"FP8 {fp8.fp8} of {' and '.join(fp8.where)}"]
    return ", ".join([recipe.train.precision, *named, *in_fp8])


@contextmanager
def joined(recipe: Recipe, run: Run) -> Iterator[Topology]:
    """This process's place among the ranks of the job, or of a job of its own. An error on one rank ends all."""
    place = start_topology(recipe)
    try:
        with together(place, run.log_file(place.rank), explain, lambda rank, error: None):
            yield place
    finally:
        topology.stop()


def open_sampler(run: Run, recipe: Recipe, place: Topology, step: int | None = None) -> tuple[Sampler, Source]:
    """The run's averaged weights on this layout, in the type of `train.precision`, and which checkpoint they are of:
    the newest, or that of `step`.

    Raises UserError where there is no such checkpoint, or a library that the recipe asks for is missing.
    """
    check_libraries(recipe, place)
    saved = _verified(run, place, step)
    model = assemble_model(recipe, place)
    with torch.no_grad():
        state = {
            f"ema/{name}": Boxes(weight.block.whole, [(weight.block.offset, weight.detach())])
            for name, weight in named_parameters(model)
        }
        saved.load(state)
    model.spread.fp8.frozen = True
    digest = describe(saved.folder / MANIFEST)["xxh64"]  # the manifest has the checksum of every file
    return Sampler.with_encoders(model, recipe, place.device), Source(saved.step, digest)


def _verified(run: Run, place: Topology, step: int | None) -> Checkpoint:
    """The newest checkpoint that verifies, or that of `step`; each rank reads a part of its files. Nothing is renamed:
    a training run may be at work in the folder."""
    found = place.everyones(committed(run.checkpoints) if place.first else None)[0]
    folders = [folder for folder in found if step in (None, step_of(folder))]
    if found and not folders:
        there = ", ".join(str(step_of(folder)) for folder in found)
        raise UserError(f"--step: {step}: {run.checkpoints} has no checkpoint of this step; valid: {there}")
    messages = []
    for folder in reversed(folders):
        problems = [problem for part in place.everyones(verify(folder, place.rank, place.ranks)) for problem in part]
        if not problems:
            saved = open_checkpoint(folder)
            if place.first:
                run.tell_of(messages, saved)
            run.check_model(saved)
            return saved
        messages.append(f"{folder} is broken: {'; '.join(dict.fromkeys(problems))}")
    raise run.no_checkpoint(messages)
