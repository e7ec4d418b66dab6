"""A whole training step of a recipe, optimizer and weight average included, on random inputs: as it is launched, as one
CUDA graph, compiled, in FP8.

One variant after another, for most recipes fill a GPU by themselves. On one rank the recipe's layout is left out; a
step has a few micro-batches at most, so that it takes seconds.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.budget import NOTHING, Asked, Step, Variant, compare_apart
from benchmarks.harness import Row, random_batch
from benchmarks.peers import FP8_KINDS, GPU, STD
from benchmarks.plan import here as gpu_here
from ecdit.assemble import assemble_engine, check_job, start_topology
from ecdit.diffusion.masking import keep_count, ratio_at
from ecdit.dtypes import DTYPES
from ecdit.model.count import forward_flops
from ecdit.recipe import Recipe
from ecdit.recipe_io import change_recipe, load_recipe
from ecdit.step import Step as TrainingStep
from launcher.plan import plan
from parallel.engine import Engine
from parallel.topology import Topology

RECIPES = Path(__file__).parents[1] / "recipes"
DEFAULT = RECIPES / ("xl_8e.yaml" if GPU else "quickstart.yaml")
ALONE = ("parallel.tensor=1", "parallel.expert=1", "parallel.expert_tensor=1", "parallel.pipeline=1")
MICRO_BATCHES = 8 if GPU else 4  # of a step on a rank, at most
SECONDS = 40.0 if GPU else 8.0
LR = 1e-4
GIB = 2**30
NOT_HERE = ("allocator slack", "CUDA, cuBLAS, NCCL", "text encoder", "autoencoder")
PLAIN = ("train.graph=false", "train.compile=false", "precision.fp8=none")
CHANGES: dict[str, tuple[str, ...]] = {"as it is launched": PLAIN}
if GPU:
    CHANGES = {
        "one CUDA graph": ("train.graph=true", "train.compile=false", "precision.fp8=none"),
        **CHANGES,
        "compiled, one CUDA graph": ("train.graph=true", "train.compile=true", "precision.fp8=none"),
    }
    for kind in FP8_KINDS:
        CHANGES[f"FP8 {kind}, one CUDA graph"] = ("train.graph=true", "train.compile=false", f"precision.fp8={kind}")


def rows(asked: Asked = NOTHING) -> list[Row]:
    """The trace is of the first variant. Raises UserError for a recipe that is wrong or does not fit this job."""
    recipe = bench_recipe(asked.recipe or DEFAULT, asked.overrides)
    place = start_topology(recipe)  # before anything is on a GPU: it says which one is this rank's
    base = f"{recipe.run}: as it is launched"
    model = recipe.model
    tokens = keep_count(model.tokens, ratio_at(recipe.masking.schedule, 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    flops = 3.0 * forward_flops(model, tokens) * recipe.train.batch / ranks
    variants = []
    for name, changes in CHANGES.items():
        about: dict[str, float] = {}
        variant = Variant(
            f"{recipe.run}: {name}",
            lambda changes=changes, about=about: _training(
                change_recipe(recipe, changes, "the benchmark"), place, about
            ),
            base if name != "as it is launched" else None,
            flops=flops,
            images=recipe.train.batch,
            about=about,
        )
        variants.append(variant)
    seconds, dtype = asked.seconds or SECONDS, DTYPES[recipe.train.precision]
    return compare_apart(asked.pick(variants), seconds, dtype, asked.trace)


def bench_recipe(path: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe with a batch of a few micro-batches a rank, on one rank without its layout."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    # the variants say which of them is a graph
    recipe = load_recipe(path, ["train.graph=false", *(ALONE if ranks == 1 else ()), *overrides])
    sizes = recipe.parallel
    lots = ranks // (sizes.tensor * sizes.pipeline) * recipe.train.micro_batch
    few = min(MICRO_BATCHES, max(1, recipe.train.batch // max(lots, 1))) * max(lots, 1)
    return change_recipe(recipe, [f"train.batch={few}", "data.canonical_nodes=1"], str(path))


@contextmanager
def _training(recipe: Recipe, place: Topology, about: dict[str, float]) -> Iterator[Step]:
    check_job(recipe, place)
    gpu = place.device.type == "cuda"
    before = torch.cuda.memory_allocated() if gpu else 0
    engine = assemble_engine(recipe, place)
    _fill_zeros(engine)
    step = TrainingStep(recipe, engine, place)
    size, count = recipe.train.micro_batch, recipe.train.batch // place.data_ranks // recipe.train.micro_batch
    batch = random_batch(recipe, size, place.device)
    calls = 0

    def one() -> None:
        nonlocal calls
        step(0, [batch] * count, LR, stop=False, logged=False).result()
        calls += 1
        if calls == 1 and gpu:  # what starting took is not a step's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    yield one
    if gpu:
        about["GiB"] = (torch.cuda.max_memory_allocated() - before) / GIB
        if recipe.precision.fp8 == "none" and place.ranks == 1:
            about["GiB planned"] = _planned(recipe) / GIB


def _planned(recipe: Recipe) -> float:
    """Bytes that a step takes, without what is not in it here: encoders, and what CUDA and the allocator add."""
    worst = plan(recipe, 1, 1, gpu_here()).worst
    return worst.peak - sum(worst.parts.get(part, 0) for part in NOT_HERE)


def _fill_zeros(engine: Engine) -> None:
    """Weights that start as zeros get numbers, for products of zeros take less power, and so less time."""
    for name, boxes in engine.state().items():
        if name.startswith("weights/"):
            for _, weight in boxes.parts:
                if not weight.any():
                    weight.normal_(std=STD)
    engine.loaded(0)
