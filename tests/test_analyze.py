"""`ecdit analyze`: what the hooks see is what the model did, and the figures follow from it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from PIL import Image
from typer.testing import CliRunner

from ecdit import UserError, reference
from ecdit.analyze import watch
from ecdit.analyze.heatmap import write_heatmap
from ecdit.analyze.study import _Watcher, study
from ecdit.analyze.watch import watch_attention, watch_routing
from ecdit.cli import app
from ecdit.data.encoders import HashText
from ecdit.diffusion.objective import objective, to_differentiate
from ecdit.model.dit import EcDit
from ecdit.model.router import Router
from ecdit.run import Run
from ecdit.sampling import Sampler, Samples, sample_settings
from parallel import topology
from parallel.graph import WARM_UP, Graphed
from parallel.spread import Spread
from parallel.topology import Layout
from tests.layouts import Case, build, global_batch, randomize, slice_of
from tests.ranks import run_on_ranks
from tests.tiny_runs import make_run, make_shapes

CASE = Case(Layout(), 1, batch=4)


def model_of(case):
    model = EcDit(case.recipe().model, recompute=case.recompute)
    randomize(model)
    return model


def passes_of(model, case, *, backward=False):
    seen, recipe = [], case.recipe()
    with watch_routing(model, seen.append):
        per_image, extra, out = objective(model, global_batch(recipe, 0), recipe)
        if backward:
            to_differentiate(per_image, extra, out, case.batch, case.batch)[0].backward()
    return seen


def hooks_of(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_a_watched_choice_is_the_papers():
    torch.manual_seed(0)
    model = model_of(CASE)
    router, x = Router(32, 8, 2.0, "expert_choice", Spread()), torch.randn(64, 32)
    router.weight.data = model.blocks["1"].moe.router.weight.data
    model.blocks["1"].moe.router.register_forward_pre_hook(lambda _, args: (x, 32))
    seen = passes_of(model, CASE)[0].layers[0]
    gates, index = reference.expert_choice(reference.affinity(x.view(2, 32, 32), router.weight), 8)
    expected = torch.zeros(2, 8, 32).scatter(-1, index, gates).transpose(1, 2).reshape(64, 8)
    torch.testing.assert_close(seen.gates, expected)
    assert torch.equal(seen.taken, expected > 0) and seen.layer == 1


@pytest.mark.parametrize("case", [CASE, replace(CASE, masked=True), replace(CASE, routing="token_choice")], ids=str)
def test_a_pass_tells_times_masks_and_every_layer(case):
    (seen,) = passes_of(model_of(case), case)
    draws, tokens = global_batch(case.recipe(), 0).draws, 8 if case.masked else 16
    assert torch.equal(seen.times, draws.t)
    assert (seen.keep is None) if draws.keep is None else torch.equal(seen.keep, draws.keep)
    assert [layer.layer for layer in seen.layers] == [1, 3]
    for layer in seen.layers:
        assert layer.taken.shape == (4 * tokens, 8)
        taken = layer.taken.view(-1, 2 * tokens, 8).sum(1)
        capacity = 2 * tokens * 2 // 8
        if case.routing == "token_choice":  # what is over an expert's capacity is dropped, and not counted
            assert (taken <= capacity).all() and 0 < layer.taken.sum() < 2 * 4 * tokens
        else:
            assert (taken == capacity).all()


@pytest.mark.parametrize("recompute", ["none", "moe", "block"])
def test_watching_a_training_step_changes_nothing_and_sees_it_once(recompute):
    case = replace(CASE, recompute=recompute)
    watched, alone = model_of(case), model_of(case)
    (seen,) = passes_of(watched, case, backward=True)
    assert [layer.layer for layer in seen.layers] == [1, 3]
    recipe = case.recipe()
    per_image, extra, out = objective(alone, global_batch(recipe, 0), recipe)
    to_differentiate(per_image, extra, out, case.batch, case.batch)[0].backward()
    for ours, theirs in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("context", [watch_routing, watch_attention])
def test_while_a_model_is_watched_nothing_is_replayed(context):
    """A replay would call no hook. Here without a GPU: a call that is to be captured fails."""
    step = Graphed(lambda numbers, _lots: numbers + 1)
    with context(model_of(CASE), lambda *_: None):
        for _ in range(WARM_UP + 1):
            assert step("key", torch.ones(1), []) == 2
    with pytest.raises(Exception, match="CUDA"):
        for _ in range(WARM_UP + 1):
            step("key", torch.ones(1), [])


def test_what_nobody_watches_has_no_hooks():
    model = model_of(CASE)
    passes_of(model, CASE)
    with watch_attention(model, lambda layer, _: None):
        assert len(hooks_of(model)) == 4
    assert not hooks_of(model)
    with pytest.raises(ZeroDivisionError), watch_routing(model, lambda seen: 1 / 0):
        objective(model, global_batch(CASE.recipe(), 0), CASE.recipe())
    assert not hooks_of(model)


def watch_rank(case):
    place = topology.start(case.layout, 1)
    model, _ = build(case, place)
    images, recipe = case.batch // place.data_ranks, case.recipe()
    first, seen = place.data_rank * images, []
    micro = slice_of(global_batch(recipe, 0), slice(first, first + images), place.device)
    with watch_routing(model, seen.append):
        objective(model, micro, recipe)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return [layer.gates for layer in seen[0].layers]


@pytest.mark.parametrize("layout", [Layout(expert=2), Layout(tensor=2)], ids=["expert", "tensor"])
def test_ranks_see_their_tokens_of_the_same_choices(layout):
    (whole,) = passes_of(model_of(CASE), CASE)
    found = run_on_ranks(watch_rank, 2, replace(CASE, layout=layout, ranks=2, chunks=2 if layout.expert > 1 else 1))
    for number, layer in enumerate(whole.layers):
        torch.testing.assert_close(torch.cat([rank[number] for rank in found]), layer.gates)


def test_the_attention_that_is_told_is_what_the_layer_does():
    """With one head the mean over the heads is the head, and probabilities times values is the layer's output."""
    case = replace(CASE, model=(("heads", 1), ("kv_heads", 1)))
    model, told, outputs = model_of(case), {}, {}
    layer = model.blocks["2"].cross_attention
    layer.out.register_forward_pre_hook(lambda _, args: outputs.update(attended=args[0]))
    layer.register_forward_pre_hook(lambda _, args: outputs.update(text=args[1]))
    with watch_attention(model, lambda number, read: told.update({number: read})):
        objective(model, global_batch(case.recipe(), 0), case.recipe())
    values = layer.key_value(outputs["text"]).chunk(2, dim=-1)[1]
    torch.testing.assert_close(told[2] @ values, outputs["attended"])
    assert sorted(told) == [0, 1, 2, 3]


def test_words_stand_where_the_encoder_put_them():
    encoder = HashText(8, 4, torch.device("cpu"))
    assert encoder.words("A red, red circle!") == ["<s>", "a", "red", "red"]
    assert encoder.words("") == ["<s>"]


# ---------------------------------------------------------------------------------------------------- a run's study


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyze")
    shapes = make_shapes(folder)
    for routing in ("expert_choice", "token_choice", "dense"):
        make_run(shapes, folder, f"run={routing}", f"model.routing={routing}", "model.layers=4")
    return folder


PROMPTS = ["a red circle", "two blue squares"]


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_a_study_is_what_a_count_by_hand_finds(runs, routing):
    run = Run(runs / routing)
    sampler = Sampler.from_run(run)
    settings = sample_settings(sampler.recipe, batch=3)  # the second batch is filled up, which is not counted
    found = study(run, PROMPTS, 2, 3, settings)
    prompts, seeds = [*PROMPTS, *PROMPTS], [3, 3, 4, 4]
    drawn = sampler.draw(prompts, seeds, settings, count_experts=True)
    assert found.samples.prompts == prompts and torch.equal(found.samples.images, drawn.images)
    assert torch.equal(found.samples.experts, drawn.experts) and found.layers == [2, 4]
    counts, uneven = drawn.experts.numpy().astype(float), found.heterogeneity()
    assert uneven["unrouted"][1, 0] == (counts[1, 0] == 0).mean()
    assert uneven["largest"][2, 1] == counts[2, 1].max() / 4
    shares = counts / counts.sum(-1, keepdims=True)
    assert uneven["largest_of_slots"][0, 1] == pytest.approx(shares[0, 1].max())
    assert found.both.diagonal(axis1=1, axis2=2).sum() == counts.sum()
    assert np.allclose(found.both, found.both.transpose(0, 2, 1))


def test_overlap_is_held_against_chance(runs):
    """Where every expert takes half of the tokens, two of them meet on a quarter by chance."""
    found = study(Run(runs / "expert_choice"), PROMPTS, 1, 0)
    same = replace(found, both=np.full((1, 2, 2), 32.0), chance=np.full((1, 2, 2), 16.0))
    assert same.lift[0, 0, 1] == 2.0 and np.isnan(same.lift[0, 0, 0])
    assert found.chance.sum() == pytest.approx((found.samples.experts.double().sum(-1) ** 2).sum().item() / 64)
    assert np.isfinite(found.lift[:, 0, 1]).all()


def test_words_are_read_against_the_average_token(runs, monkeypatch):
    """Where token s gives every word s times as much, an expert reads as far down as the tokens that it takes are."""
    weight = torch.arange(64.0)[None, :, None]
    monkeypatch.setattr(watch, "_probabilities", lambda _, x, text, mask: weight.expand(len(x), -1, text.shape[1]))
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(_Watcher, "routing", lambda self, one, add=_Watcher.routing: (seen.append(one), add(self, one)))
        run = Run(runs / "expert_choice")
        found = study(run, PROMPTS, 1, 0, sample_settings(run.recipe(), batch=2))
    assert found.words == ["<s>", "a", "red", "circle", "two", "blue", "squares"]
    taken = torch.stack([one.layers[0].taken.view(2, 2, 64, 4)[0, 0] for one in seen]).float()  # (V, S, E), "red" alone
    expected = (taken * weight[..., 0, None]).sum((0, 1)) / taken.sum((0, 1)) / 31.5
    assert np.allclose(found.reading[0, :, found.words.index("red")], expected)
    assert np.allclose(found.time_profile.mean(0), 1)


def test_the_command_leaves_pictures_and_data(runs):
    done = CliRunner().invoke(app, ["analyze", str(runs / "expert_choice"), "-n", "1"])
    assert done.exit_code == 0, done.output
    folder = runs / "expert_choice/analysis"
    names = {"allocation.png", "heterogeneity.png", "specialisation.png", "overlap.png"}
    assert {path.name for path in folder.iterdir()} == names | {"analysis.json", "analysis.npz"}
    record = json.loads((folder / "analysis.json").read_text())
    arrays = np.load(folder / "analysis.npz")
    assert arrays["experts_per_token"].shape == (4, 2, 4, 64)
    assert record["unrouted_share"] == pytest.approx((arrays["experts_per_token"] == 0).mean())
    assert [layer["layer"] for layer in record["layers"]] == [2, 4]
    assert len(record["layers"][0]["experts_by_number"]) == 4


def test_any_prompt_can_stand_over_its_picture(tmp_path, recwarn):
    """A dollar begins no formula, a script without glyphs is no warning, a long prompt leaves room for pictures."""
    sizes = []
    for prompts in (["$\\frac{ is no formula", "赤い丸"], ["a red circle"], ["a very long prompt " * 30]):
        images, experts = torch.zeros(len(prompts), 32, 32, 3, dtype=torch.uint8), torch.ones(3, 2, len(prompts), 64)
        write_heatmap(Samples(images, images, prompts, [0], [0.0, 0.5, 0.9], experts), tmp_path / "a.png", [2, 4])
        with Image.open(tmp_path / "a.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        sizes.append((np.ptp(pixels, axis=2) > 30).sum())  # coloured ones
    assert min(sizes) > 0.8 * max(sizes) and not [w for w in recwarn if "Glyph" in str(w.message)]


def test_a_dense_run_has_nothing_to_show(runs):
    with pytest.raises(UserError, match=r"model.routing: dense has no experts; valid here: expert_choice"):
        study(Run(runs / "dense"), PROMPTS, 1, 0)
