"""The planner against what ranks really hold, need and send; and its answers for the paper's largest model."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state

from ecdit.errors import UserError
from ecdit.recipe_io import load_recipe, parse_recipe
from launcher.plan import plan
from launcher.plan.gpus import GPUS, load
from launcher.plan.memory import both_buffers, buffers, static
from launcher.plan.search import best_layout, search
from launcher.plan.spread import Place
from launcher.plan.stage import stage
from parallel import topology
from parallel.topology import Layout
from tests.layouts import Case, build, global_batch, slice_of
from tests.ranks import run_on_ranks
from tests.test_train import complaint, ecdit

ROOT = Path(__file__).parents[1]
LARGER = (("width", 128), ("heads", 8), ("kv_heads", 8), ("layers", 6), ("patch", 1), ("group_tokens", 128))
CASES = [
    (Case(Layout(), 1, batch=8, model=LARGER), 1),
    (Case(Layout(), 2, batch=16, model=LARGER), 2),
    (Case(Layout(tensor=2), 2, batch=8, model=LARGER), 2),
    (Case(Layout(tensor=2, expert=2, sequence=True), 2, batch=8, model=LARGER), 2),
    (Case(Layout(expert=4), 4, batch=32, model=LARGER), 4),
    (Case(Layout(expert=2, expert_tensor=2), 4, batch=32, model=LARGER), 4),
    (Case(Layout(pipeline=2, expert=2), 4, batch=16, model=LARGER), 4),
    (Case(Layout(expert=2), 2, batch=16, recompute="block", model=LARGER), 2),
]


def measure(case):
    """What rank 0 holds, and what torch's profiler sees it need for one forward and backward pass."""
    recipe, place = _recipe(case), topology.start(case.layout, 1)
    model, engine = build(case, place)
    held = {
        "weights": sum(b.param_data.nbytes for buckets in engine._buckets for b in buckets.buckets),
        "gradients": sum(b.grad_data.nbytes for buckets in engine._buckets for b in buckets.buckets),
        "master weights": _bytes(engine._masters),
        "optimizer states": sum(_bytes(values) for values in engine._optimizer.states.values()),
        "EMA": _bytes(engine._ema.slices),
    }
    peak = 0
    if case.layout.pipeline == 1:
        images = recipe.train.micro_batch
        batch = slice_of(global_batch(recipe, 0), slice(0, images), place.device)
        _step(engine, recipe, batch)  # what is made once
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as profiler:
            _step(engine, recipe, batch)
        peak = _peak(profiler)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return held, peak


def _recipe(case):
    values = case.recipe().model_dump(mode="json")
    values["train"]["recompute"] = case.recompute
    size = case.layout
    values["parallel"] |= {
        "tensor": size.tensor, "expert": size.expert, "expert_tensor": size.expert_tensor, "pipeline": size.pipeline,
        "sequence": size.sequence,
    }  # fmt: skip
    return parse_recipe(values, "a case")


def _step(engine, recipe, batch):
    from ecdit.diffusion.objective import objective, to_differentiate

    def loss(model, micro, hidden):
        per_image, extra, out = objective(model, micro, recipe, hidden)
        return to_differentiate(per_image, extra, out, len(micro.latents), len(micro.latents))

    engine.accumulate([batch], 1, loss, (0, 0, 0))


def _bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def _peak(profiler):
    """Bytes at most over what was there at first, from the allocations and releases in their order."""
    changes = [
        (event.start_ns(), event.nbytes()) for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]  # fmt: skip
    live = most = 0
    for _, change in sorted(changes):
        live += change
        most = max(most, live)
    return most


@pytest.mark.parametrize("case, ranks", CASES, ids=lambda value: str(value))
def test_memory_is_what_a_rank_holds_and_needs(case, ranks):
    held, peak = run_on_ranks(measure, ranks, case)[0]
    recipe, place = _recipe(case), Place(case.layout, ranks)
    assert static(recipe, place) == held
    if peak:
        planned = stage(recipe, place, GPUS["h100"], most=True, device="cpu").peak
        assert planned == pytest.approx(peak, rel=0.1)
