"""`init_from`: weights come in bit for bit on any layout, a model that differs is refused, dense becomes sparse."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from ecdit import UserError, load_recipe
from ecdit.assemble import assemble_engine, start_topology
from ecdit.callbacks import Callback
from ecdit.export.diffusers_folder import write_pipeline
from ecdit.export.weights import checkpoint_of, write_file
from ecdit.init_from import fill_state, gate_scale, open_source
from ecdit.model.dit import EcDit
from ecdit.model.experts import Ffn
from ecdit.model.moe import Moe
from ecdit.recipe_io import dump_recipe
from ecdit.run import Run
from ecdit.train import train
from parallel import topology
from parallel.checkpoint.folder import Keep
from parallel.checkpoint.store import CheckpointStore
from parallel.spread import Spread
from tests.ranks import run_on_ranks
from tests.tiny_runs import ROOT, TINY, make_run, make_shapes

STRONG = ["train.steps=12", "optimizer.lr=1e-2", "model.layers=4"]


@dataclass(frozen=True)
class Place:
    """Where the tests' runs are."""

    shapes: Path
    runs: Path

    def recipe(self, *overrides):
        data = f"data.streams=[{{path: {self.shapes}}}]"
        return load_recipe(ROOT / "recipes/quickstart.yaml", [*TINY, data, "model.layers=4", *overrides])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    shapes = make_shapes(folder)
    for routing in ("dense", "expert_choice"):
        run = Run(make_run(shapes, folder, f"run={routing}", *STRONG, f"model.routing={routing}"))
        write_file(checkpoint_of(run), "ema", "fp32", folder / f"{routing}.safetensors")
        write_pipeline(run, "ema", "fp32", folder / f"{routing}-pipeline")
    return Place(shapes, folder)


SOURCES = ["{}", "{}.safetensors", "{}-pipeline"]
# (source, layout): two layouts take in every kind of source
TAKEN = [(source, layout) for source in SOURCES for layout in ("parallel.expert=2", "parallel.tensor=2")]


def start_and_save(recipes, runs):
    """On every rank: each recipe's run as it is before its first step, saved."""
    for recipe in recipes:
        here = start_topology(recipe)
        engine = assemble_engine(recipe, here)
        fill_state(recipe, open_source(recipe), engine.state())
        engine.loaded(0)
        store = CheckpointStore(runs / recipe.run / "checkpoints", here, Keep(1), asynchronous=False, timeout_minutes=1)
        store.save(0, engine.state(), {"recipe": dump_recipe(recipe), "samples": 0, "updates": 0, "skipped": 0})
        assert store.ended().error is None
        if here.first:
            Run(runs / recipe.run).write_recipe(recipe)
        parallel_state.destroy_model_parallel()
    topology.stop()


def saved(run):
    """Both kinds of weights of a run's newest checkpoint."""
    found = checkpoint_of(Run(run))
    return found.kind("weights"), found.kind("ema")


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_round_trip_is_bit_for_bit_on_two_layouts(place):
    """Exported, taken in by two ranks in either layout, saved by them, exported again."""
    recipes = [
        place.recipe(f"run=trip-{number}", f"init_from={place.runs}/{source.format('expert_choice')}", layout)
        for number, (source, layout) in enumerate(TAKEN)
    ]
    run_on_ranks(start_and_save, 2, recipes, place.runs)
    exported = load_file(place.runs / "expert_choice.safetensors")
    for recipe in recipes:
        weights, averages = saved(place.runs / recipe.run)
        assert same(weights, exported) and same(averages, exported)
        again = place.runs / f"{recipe.run}.safetensors"
        write_file(checkpoint_of(Run(place.runs / recipe.run)), "ema", "fp32", again)
        assert same(load_file(again), exported)


def test_a_bf16_export_comes_in_as_it_is(place):
    run = Run(place.runs / "expert_choice")
    write_pipeline(run, "ema", "bf16", place.runs / "rounded")
    run_on_ranks(start_and_save, 1, [place.recipe("run=bf16", f"init_from={place.runs}/rounded")], place.runs)
    weights, _ = saved(place.runs / "bf16")
    exported = load_file(place.runs / "expert_choice.safetensors")
    assert all(torch.equal(weights[name], exported[name].bfloat16().float()) for name in exported)


class Told(Callback):
    """What the user reads, and the loss of each step."""

    def __init__(self):
        self.messages, self.losses = [], []

    def on_message(self, message):
        self.messages.append(message)

    def on_step(self, trainer, record):
        self.losses.append(record["loss"])


def run_training(recipe, runs):
    told = Told()
    assert train(recipe, runs, [told]) == 0
    return told


def test_training_starts_from_the_weights_and_a_resume_ignores_them(place, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((place.runs / "expert_choice.safetensors").read_bytes())
    recipe = place.recipe("run=tuned", f"init_from={copy}", "train.steps=2")
    told = run_training(recipe, tmp_path)
    assert "Starts from the averaged weights of" in told.messages[0] and "the optimizer is fresh" in told.messages[0]
    fresh = run_training(place.recipe("run=fresh", "train.steps=1"), tmp_path)
    assert told.losses[0] < 0.95 * fresh.losses[0]
    copy.unlink()  # the run has begun: it goes on from its own checkpoint
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 3})})
    assert any("Resumed from" in message for message in run_training(longer, tmp_path).messages)


REFUSED = {
    "model.width=64": ["model.width: 64 in the recipe, 32 in init_from"],
    "model.layers=2": ["model.layers: 2 in the recipe, 4 in init_from"],
    "model.experts=8": ["model.experts: 8 in the recipe, 4 in init_from"],
    "model.sparse_layers=all": ["model.sparse_layers: 'all' in the recipe, 'every_second' in init_from"],
    "model.routing=dense": ["model.routing: 'dense' in the recipe, 'expert_choice' in init_from"],
    "model.heads=4 model.kv_heads=4 model.patch=2": [
        "model.heads: 4 in the recipe, 2 in init_from",
        "model.kv_heads: 4 in the recipe, 2 in init_from",
        "model.patch: 2 in the recipe, 4 in init_from",
    ],
}


@pytest.mark.parametrize("overrides", REFUSED)
@pytest.mark.parametrize("source", SOURCES)
def test_another_model_is_refused_with_its_keys(place, overrides, source):
    recipe = place.recipe(f"init_from={place.runs}/{source.format('expert_choice')}", *overrides.split())
    with pytest.raises(UserError, match="is of another model") as error:
        open_source(recipe)
    assert all(line in str(error.value) for line in REFUSED[overrides])


def test_what_does_not_decide_a_weight_may_differ(place):
    open_source(place.recipe(f"init_from={place.runs}/expert_choice", "model.routing=token_choice"))
    open_source(
        place.recipe(f"init_from={place.runs}/expert_choice", "model.text_tokens=8", "model.capacity_factor=1.0")
    )


def test_it_is_refused_before_the_data_is_opened(place, tmp_path):
    recipe = place.recipe("run=early", f"init_from={tmp_path}/absent", "data.streams=[{path: absent}]")
    with pytest.raises(UserError, match=r"init_from: '.*absent': no weights here; valid: a run's folder, or what"):
        train(recipe, tmp_path, [])
    assert not (tmp_path / "early/recipe.yaml").exists()


def test_weights_that_cannot_be_used_are_named(place, tmp_path):
    nameless, torn = tmp_path / "nameless.safetensors", tmp_path / "torn.safetensors"
    save_file({"a": torch.zeros(1)}, nameless)
    torn.write_bytes((place.runs / "dense.safetensors").read_bytes()[:5000])
    lost = load_file(place.runs / "expert_choice.safetensors")
    facts = {"step": "1", "recipe": checkpoint_of(Run(place.runs / "expert_choice")).meta["recipe"]}
    save_file({name: t for name, t in lost.items() if name != "time.up.bias"}, tmp_path / "lost.safetensors", facts)
    for file, message in ((nameless, "does not say which model it is of"), (torn, "cannot read these weights")):
        with pytest.raises(UserError, match=message):
            open_source(place.recipe(f"init_from={file}"))
    with pytest.raises(UserError, match=r"lost.safetensors' has no tensor time.up.bias"):
        train(place.recipe("run=lost", f"init_from={tmp_path}/lost.safetensors"), tmp_path, [])
    for text in ("a: [", "run: x", "[]"):
        save_file(lost, tmp_path / "vague.safetensors", {"step": "1", "recipe": text})
        with pytest.raises(UserError, match=r"vague.safetensors: does not say which model it is of"):
            open_source(place.recipe(f"init_from={tmp_path}/vague.safetensors"))


@pytest.mark.parametrize(("source", "routing"), [("dense", "dense"), ("dense", "expert_choice")])
def test_a_tensor_of_another_shape_is_not_spread_over_the_models(place, tmp_path, source, routing):
    """As copying a row into a matrix would."""
    weights = load_file(place.runs / f"{source}.safetensors")
    name = next(name for name in weights if name.endswith("blocks.1.ffn.down.weight"))
    facts = {"step": "1", "recipe": checkpoint_of(Run(place.runs / source)).meta["recipe"]}
    save_file(weights | {name: weights[name][:1].clone()}, tmp_path / "cut.safetensors", facts)
    with pytest.raises(UserError, match=rf"cut.safetensors' has {name} as \[1, \d+\]; the model has \["):
        train(
            place.recipe("run=cut", f"init_from={tmp_path}/cut.safetensors", f"model.routing={routing}"), tmp_path, []
        )


def test_a_damaged_checkpoint_is_not_started_from(place, tmp_path):
    run = tmp_path / "dense"
    shutil.copytree(place.runs / "dense", run)
    file = next((run / "checkpoints/step-12").glob("__*"))
    data = bytearray(file.read_bytes())
    data[100] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"init_from: .*step-12 is broken: .* is damaged"):
        train(place.recipe("run=new", f"init_from={run}", "model.routing=dense"), tmp_path, [])


# ---------------------------------------------------------------------------------------------------------- upcycling


@pytest.mark.parametrize("source", SOURCES)
def test_every_expert_is_a_copy_and_the_router_is_fresh(place, source):
    name = f"upcycled-{SOURCES.index(source)}"
    recipe = place.recipe(f"run={name}", f"init_from={place.runs}/{source.format('dense')}", "parallel.expert=2")
    run_on_ranks(start_and_save, 2, [recipe], place.runs)
    dense, (weights, averages) = load_file(place.runs / "dense.safetensors"), saved(place.runs / name)
    assert same(weights, averages)
    fresh = EcDit(recipe.model, recipe.train.seed).state_dict()
    scale = torch.tensor(gate_scale(recipe.model))
    for name, weight in weights.items():
        block, moe, part = name.partition(".moe.")
        if not moe:
            assert torch.equal(weight, dense[name])
        elif part == "router.weight":
            assert torch.equal(weight, fresh[name])
        else:
            of_dense = dense[f"{block}.ffn.{part.removeprefix('experts.')}.weight"]
            of_dense = of_dense if part == "experts.up" else of_dense * scale
            assert len(weight) == 4 and all(torch.equal(expert, of_dense) for expert in weight)


def layers(experts, routing="expert_choice", capacity_factor=2.0, scale=1.0):
    """A dense layer and the MoE layer that it becomes."""
    dense, sparse = Ffn(64, Spread()), Moe(64, experts, capacity_factor, routing, Spread())
    torch.manual_seed(0)
    for linear in (dense.up, dense.down):
        linear.weight.data.normal_(std=0.1)
    sparse.router.weight.data.normal_(std=64**-0.5)
    sparse.experts.up.data.copy_(dense.up.weight.data)
    sparse.experts.down.data.copy_(dense.down.weight.data * scale)
    return dense, sparse


@torch.no_grad()
def test_a_token_gets_the_sum_of_its_gates_times_the_dense_output():
    """What holds exactly at step 0, for every token: also for one that no expert took, which gets nothing."""
    x = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(1))
    dense, sparse = layers(8, capacity_factor=1.0, scale=1.6)
    out, plan = sparse(x, 256)
    gates = torch.zeros(256).index_add(0, plan.token, plan.gate)
    assert (gates == 0).any()
    torch.testing.assert_close(out, 1.6 * gates.view(2, 128, 1) * dense(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_token_choice_leaves_the_output_unchanged_where_nothing_is_dropped():
    x = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(1))
    dense, sparse = layers(8, "token_choice", capacity_factor=8.0)
    torch.testing.assert_close(sparse(x, 256)[0], dense(x), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("experts", [8, 16, 64])
def test_the_scaled_gates_sum_to_one_on_average(place, experts):
    """For normalised tokens under a fresh router, to a tenth: the closed form leaves out that the logit which made an
    expert take a token stands in the softmax's denominator too."""
    model = place.recipe().model.model_copy(update={"experts": experts})
    x = torch.nn.functional.layer_norm(torch.randn(8, 1024, 64), (64,))
    _, sparse = layers(experts)
    plan = sparse.router(x.view(-1, 64), 1024)
    assert gate_scale(model) * plan.gate.sum().item() / 8192 == pytest.approx(1, abs=0.1)
    assert gate_scale(model) == pytest.approx(1 / NormalDist().cdf(1 - NormalDist().inv_cdf(1 - 2 / experts)))


def test_token_choice_is_not_scaled(place):
    assert gate_scale(place.recipe("model.routing=token_choice").model) == 1.0
