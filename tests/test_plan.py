"""The planner against what ranks really hold, need and send; and its answers for the paper's largest model."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit.diffusion.objective import objective, to_differentiate
from ecdit.errors import UserError
from ecdit.recipe_io import load_recipe, parse_recipe
from launcher.plan import plan
from launcher.plan.gpus import GPUS, load
from launcher.plan.memory import both_buffers, buffers, static
from launcher.plan.search import best_layout, candidates, changes, search
from launcher.plan.spread import Place
from launcher.plan.stage import stage
from launcher.plan.trace import trace
from parallel import topology
from parallel.topology import Layout
from tests.command import ecdit
from tests.layouts import Case, build, global_batch, slice_of
from tests.ranks import run_on_ranks
from tests.test_train import complaint

ROOT = Path(__file__).parents[1]
FEW = 4096  # bytes: losses, scalars of a router
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
    _, engine = build(case, place)
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


SHARE_SENT = {  # kind, and the share of the largest tensor that a rank of n sends
    "alltoall_base_": ("all-to-all", lambda n: (n - 1) / n),
    "allreduce_": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "_allgather_base_": ("all-gather", lambda n: (n - 1) / n),
    "_reduce_scatter_base_": ("reduce-scatter", lambda n: (n - 1) / n),
}


class Counted(TorchDispatchMode):
    """Bytes that this rank sends to others, by kind of collective, without what is a few numbers."""

    def __init__(self, ranks):
        super().__init__()
        self.ranks, self.sent = ranks, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("c10d::")
        if name in SHARE_SENT:
            tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if torch.is_tensor(t)]
            size = max(t.numel() * t.element_size() for t in tensors)
            kind, share = SHARE_SENT[name]
            # the experts' exchange says how many rows go where, and none to itself
            uneven = name == "alltoall_base_" and len(set(args[3])) > 1
            if size > FEW:
                self.sent[kind] = self.sent.get(kind, 0) + size * (1.0 if uneven else share(self.ranks))
        return function(*args, **(kwargs or {}))


def count(case):
    """What rank 0 sends in one forward and backward pass."""
    recipe, place = _recipe(case), topology.start(case.layout, 1)
    model, _ = build(case, place)
    batch = slice_of(global_batch(recipe, 0), slice(0, recipe.train.micro_batch), place.device)
    with Counted(2) as counted:
        per_image, extra, out = objective(model, batch, recipe)
        to_differentiate(per_image, extra, out, len(batch.latents), len(batch.latents))[0].backward()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return counted.sent


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2), Layout(tensor=2, sequence=True), Layout(expert=2), Layout(expert=2, tensor=2)], ids=str
)
def test_traffic_is_what_a_rank_sends(layout):
    case = Case(layout, 2, batch=16 // layout.tensor, model=LARGER)
    counted = run_on_ranks(count, 2, case)[0]
    planned = {}
    for (kind, _, _), (_, size, _) in stage(_recipe(case), Place(layout, 2), GPUS["h100"], most=True).sent.items():
        planned[kind] = planned.get(kind, 0) + size
    # tensor ranks' gradients of what all have are summed at the end of a step, not within the model
    assert planned == pytest.approx(counted, rel=0.02)


def test_the_largest_model_fits_on_eight_nodes_and_says_why_not_on_one():
    fits = ecdit("plan", ROOT / "recipes/m_64e.yaml", "--nodes", 8, "--gpu", "h100", "--json")
    assert fits.returncode == 0, fits.stderr
    told = json.loads(fits.stdout)
    assert told["fits"] and 0 < told["margin"] < 0.2 * 80e9 and told["peak"] < 80e9
    assert told["parameters"] == pytest.approx(96.5e9, rel=0.01)
    refused = complaint(ecdit("plan", ROOT / "recipes/m_64e.yaml", "--nodes", 1, "--gpu", "h100"))
    assert "planned with parallel.expert=8" in refused
    assert "does not fit on 1 x 8 h100" in refused and "The largest part is optimizer states" in refused
    assert "It fits with 8 nodes" in refused


def test_search_ranks_valid_layouts_that_fit():
    recipe = load_recipe(ROOT / "recipes/xl_8e.yaml", ["train.batch=256"])
    found = search(recipe, 1, 4, GPUS["a100"])
    assert len(found) > 5
    assert [made.step_seconds for made in found] == sorted(made.step_seconds for made in found)
    for made in found:
        assert made.margin >= 0 and made.ranks == 4
        parse_recipe(made.recipe.model_dump(mode="json"), "a plan's recipe")


def test_a_graph_keeps_no_pipeline_from_being_searched():
    """Stages wait for each other, so no graph goes with them: it is left out there, and the overrides say so."""
    recipe = load_recipe(ROOT / "recipes/xl_8e.yaml", ["train.batch=256"])
    assert recipe.train.graph
    staged = [made for made in candidates(recipe, 4, 4) if made.parallel.pipeline == 2]
    assert staged and all("train.graph=false" in changes(recipe, made) for made in staged)
    alone = [made for made in candidates(recipe, 4, 4) if made.parallel.pipeline == 1]
    assert alone and all(made.train.graph for made in alone)


@settings(max_examples=10, deadline=None)
@given(nodes=st.sampled_from([1, 2, 4, 8]), expert=st.sampled_from([1, 2, 4, 8]), tensor=st.sampled_from([1, 2, 3, 6]))
def test_more_nodes_never_need_more_memory_of_a_rank(nodes, expert, tensor):
    keys = [f"parallel.expert={expert}", f"parallel.tensor={tensor}", "train.micro_batch=24", "train.batch=4608"]
    recipe = load_recipe(ROOT / "recipes/xl_8e.yaml", keys)
    fewer, more = (
        sum(static(recipe, Place(Layout(tensor, expert), ranks)).values()) for ranks in (nodes * 24, nodes * 48)
    )
    assert more <= fewer


@given(sizes=st.lists(st.integers(1, 10_000), min_size=1, max_size=20), group=st.sampled_from([1, 2, 3, 8]))
def test_every_element_is_some_rank_s(sizes, group):
    kept = buffers(sizes, group, group)
    assert kept.padded % group == 0 and kept.padded >= sum(sizes)
    assert sum(sizes) / group <= kept.piece or group > 1
    assert kept.piece <= kept.padded // group


def test_a_layout_is_chosen_for_the_nodes_that_are_there():
    recipe = load_recipe(ROOT / "recipes/quickstart.yaml")
    assert best_layout(recipe, 1, 1, None) == []
    assert best_layout(recipe, 2, 2, None) == ["train.micro_batch=4"]
    expert = load_recipe(ROOT / "recipes/quickstart.yaml", ["parallel.expert=4", "train.micro_batch=4"])
    assert best_layout(expert, 4, 1, None) == []
    assert best_layout(expert, 2, 1, None) == ["parallel.expert=2"]
    with pytest.raises(UserError, match=r"3 ranks: no layout of this model and train.batch: 16"):
        best_layout(recipe, 3, 1, None)


DIVISORS = (
    "memory", "bf16", "fp32", "hbm", "nvlink", "network", "gpus_per_node", "product_share", "fp8_share", "hbm_share",
    "link_share", "pcie", "host", "disk",
)  # fmt: skip


def test_a_gpu_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("like: h100\nmemory: 40.0e+9\n")
    assert (load(str(file)).memory, load(str(file)).bf16, load(str(file)).name) == (40e9, GPUS["h100"].bf16, "mine")
    for text, problem in (
        ("like: h1000", "like: 'h1000' is not known"),
        ("like: h100\nmemroy: 1", "memroy: unknown key"),
        ("memory: 1", "missing bf16"),
        ("like: [h100]", r"like: \['h100'\] is not known; valid: a100"),
        ("like: h100\nname: 2026-13-13", "cannot read this GPU: month"),
        ("like: h100\nname: [a]", "name: .* is no text"),
        ("like: h100\nhbm: fast", "hbm: 'fast' is no number"),
        ("like: h100\nhbm: true", "hbm: True is no number"),
        ("like: h100\nhbm: 1" + 400 * "0", "hbm: 10.* is no number"),
        ("like: h100\nmemory: .nan", "memory: nan is no number; valid: a finite number over 0"),
        ("like: h100\nnetwork: -1", "network: -1 is out of range; valid: a finite number over 0"),
        ("like: h100\nproduct_share: 70", "product_share: 70 is out of range; .* at most 1"),
        ("like: h100\ngpus_per_node: .inf", "gpus_per_node: inf is no number; valid: 1, 2, 3"),
        ("like: h100\ngpus_per_node: 2.5", "gpus_per_node: 2.5 is out of range"),
        *((f"like: h100\n{key}: 0", f"{key}: 0 is out of range") for key in DIVISORS),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"{file}: {problem}"):
            load(str(file))
    file.write_bytes(b"like: h100 # \xe9")
    with pytest.raises(UserError, match=f"{file}: cannot read this GPU"):
        load(str(file))
    file.write_text("like: h100\nfp8: 0\nlink_latency: 0\ngpus_per_node: 4.0\nproduct_share: 1")
    assert (load(str(file)).fp8, load(str(file)).gpus_per_node, load(str(file)).product_share) == (0, 4, 1)
    with pytest.raises(UserError, match="'h1000' is not known; valid: a100"):
        load("h1000")


def test_a_plan_has_all_of_its_time_and_memory():
    recipe = load_recipe(
        ROOT / "recipes/xl_8e.yaml",
        ["parallel.expert=2", "parallel.pipeline=2", "train.batch=512", "train.graph=false"],
    )
    made = plan(recipe, 1, 8, GPUS["h100"])
    assert len(made.memory) == 2 and made.memory[0].parts["activations"] > made.memory[1].parts["activations"]
    assert made.images_per_s == pytest.approx(512 / made.step_seconds)
    assert {one.axis for one in made.traffic} == {"expert", "pipeline", "data", "expert-data"}
    assert sum(b.padded for b, _ in both_buffers(recipe, Place(Layout(pipeline=2, expert=2), 8))) > 0


def test_a_plan_for_a_gpu_sees_the_kernels_that_run_there():
    recipe = load_recipe(ROOT / "recipes/xl_8e.yaml", ["train.micro_batch=8", "train.batch=64"])
    gpu, cpu = (trace(recipe, Place(Layout(), 1), 2, 256, device) for device in ("cuda", "cpu"))
    routing = [sum(kernel.part == "routing" for kernel in found.kernels) for found in (gpu, cpu)]
    assert routing[0] < routing[1] / 1.5
    # AdaLN keeps a row's mean and deviation, and no normalised rows
    rest = [sum(kernel.bytes for kernel in found.kernels if kernel.part == "rest") for found in (gpu, cpu)]
    assert rest[0] < rest[1]
