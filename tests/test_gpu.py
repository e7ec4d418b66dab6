"""What needs a GPU: the same parity there, Transformer Engine's linears, steps without a wait and as a graph."""

import numpy as np
import pytest
import torch

from ecdit import load_recipe
from ecdit.analyze.study import Study, study
from ecdit.analyze.watch import watch_attention, watch_routing
from ecdit.callbacks.held_out import HeldOutLoss
from ecdit.data.encoders import load_text_encoder
from ecdit.data.prepare import prepare_shapes
from ecdit.sampling import Sampler
from ecdit.train import train
from parallel.topology import Layout
from tests.gpu import Curve, differences
from tests.layouts import Case, train_case, train_oracle
from tests.tiny_encoders import WIDTH, make_text_encoder
from tests.tiny_runs import random_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def on_one_gpu(case):
    found = train_case(case)
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice", "dense"])
@pytest.mark.parametrize("masked", [False, True])
def test_one_gpu_trains_as_the_oracle(routing, masked):
    case = Case(Layout(), 1, routing, masked, accumulation=2)
    found = differences(on_one_gpu(case), train_oracle(case))
    print(case, found)
    assert found[0] < 1e-5 and found[1] < 1e-4 and found[2] < 1e-4


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_transformer_engine_linears_are_torchs(recompute):
    """Also where gradients of two micro-batches add up, in the products or, of what is recomputed, after them."""
    case = Case(Layout(), 1, linears="transformer_engine", model=(("width", 64),), accumulation=2, recompute=recompute)
    found = differences(on_one_gpu(case), train_oracle(case))
    print(case, found)
    # Transformer Engine lets cuBLAS multiply fp32 in TF32, which keeps ten bits: it did on one machine, not on another
    assert found[0] < 1e-4 and found[1] < 2e-2 and found[2] < 2e-2


def test_a_compiled_text_encoder_is_the_plain_one(tmp_path):
    folder, device = make_text_encoder(tmp_path / "t5"), torch.device("cuda")
    encoder = load_text_encoder(str(folder), width=WIDTH, tokens=8, device=device)
    captions = ["a man", "", "the photo of a woman with a man", "on"]
    plain, mask = encoder(captions)
    assert encoder.compile(len(captions))
    compiled, same_mask = encoder(captions)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    assert torch.equal(mask, same_mask)


def test_bf16_is_within_its_tolerance():
    case = Case(Layout(), 1, accumulation=2, precision=torch.bfloat16, routing="dense")
    found = differences(on_one_gpu(case), train_oracle(case))
    print(case, found)
    assert found[0] < 1e-2 and found[1] < 5e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("routing", ["expert_choice", "token_choice", "dense"])
def test_a_step_makes_no_host_wait_and_is_the_same_as_a_graph(tmp_path, routing, precision):
    prepare_shapes(tmp_path / "shapes", count=64, seed=0)
    changes = [
        f"data.streams=[{{path: {tmp_path}/shapes}}]", f"model.routing={routing}", "train.steps=10", "train.batch=16",
        "train.micro_batch=8", "masking.ratio=[[0,0.5],[6,0.0]]", "log.grid_every=0", "checkpoint.every=100",
        f"train.precision={precision}", f"log.held_out={{path: {tmp_path}/shapes, every: 7, pictures: 16}}",
    ]  # fmt: skip
    curves = {}
    for graph in (False, True):
        name = f"{routing}-{graph}"
        recipe = load_recipe("recipes/quickstart.yaml", [*changes, f"train.graph={graph}", f"run={name}"])
        curve = Curve()
        assert train(recipe, tmp_path, [curve, HeldOutLoss()]) == 0
        curves[graph] = curve.losses
    print(routing, max(abs(a - b) / b for a, b in zip(curves[True], curves[False], strict=True)))
    assert curves[True] == pytest.approx(curves[False], rel=1e-5)
    seen = [np.load(tmp_path / f"{routing}-{graph}/held-out/step-10.npy") for graph in (False, True)]
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)  # the averaged weights were put in and taken out again


def test_a_watched_sampler_draws_what_its_graph_draws(tmp_path):
    """`ecdit analyze` on a GPU, and pictures after it."""
    run = random_run(tmp_path)
    sampler, settings = Sampler.from_run(run), run.recipe().sample.model_copy(update={"steps": 6, "batch": 2})
    prompts, seeds = ["a red circle", "a blue square"], [0, 1]
    replayed = sampler.draw(prompts, seeds, settings).latents
    seen = []
    with watch_attention(sampler.model, lambda layer, _: None), watch_routing(sampler.model, seen.append):
        watched = sampler.draw(prompts, seeds, settings).latents
    again = sampler.draw(prompts, seeds, settings).latents
    assert len(seen) == 6 and len(seen[0].layers) == 2
    torch.testing.assert_close(watched, replayed, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, replayed) and isinstance(study(run, prompts, 1, 0, settings), Study)
