"""FP8 on a GPU that has it: layers beside the oracle, runs beside those in bf16, states in checkpoints."""

from contextlib import nullcontext
from statistics import mean

import pytest
import torch

from benchmarks.peers import in_fp8, randomized
from ecdit import load_recipe, reference
from ecdit.callbacks import Callback
from ecdit.data.prepare import prepare_shapes
from ecdit.model.dit import EcDit
from ecdit.model.experts import Ffn
from ecdit.model.moe import Moe
from ecdit.run import Run
from ecdit.sampling_job import joined, open_sampler, sampling_recipe
from ecdit.train import train
from parallel.precision import KINDS, fp8_modules
from parallel.spread import Spread
from parallel.topology import Layout
from tests.layouts import Case, randomize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="no GPU with FP8"
    ),
]
WIDTH, EXPERTS, GROUPS, TOKENS = 512, 8, 4, 1024
# Of two products in a row: three bits of a mantissa are 2.6% off in the mean square, so a product of two numbers is
# 3.7% off and two products in a row 5.2%; gradients have two bits, 5.2%. What a block adds it to is not rounded.
LAYER = 6e-2, 1e-1


def gradients(function, inputs, weights):
    """Result and gradients, of inputs and weights, in fp32."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, [*inputs, *weights], slope)
    return [x.detach().float() for x in (out, *found)]


def errors(found, expected):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def make_moe(spread):
    with torch.device("cuda"):
        return randomized(Moe(WIDTH, EXPERTS, 2.0, "expert_choice", spread)).bfloat16()


def moe_beside_the_oracle(moe, region):
    x = torch.randn(GROUPS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
    weights = [moe.router.weight, moe.experts.up, moe.experts.down]

    def ours(x):
        with region():
            return moe(x, TOKENS)[0]

    def oracle(x):
        return reference.expert_choice_moe(x, wide[0], wide[1].mT, wide[2].mT, 2.0)

    found = gradients(ours, [x], weights)
    wide = [w.detach().float().requires_grad_() for w in weights]
    return errors(found, gradients(oracle, [x.float()], wide))


def test_a_moe_layer_in_bf16_is_the_oracles():
    found = moe_beside_the_oracle(make_moe(Spread()), nullcontext)
    print("bf16: result, gradients of tokens, router, up, down:", found)
    assert max(found) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_moe_layer_in_fp8_is_the_oracles(kind):
    with in_fp8(kind, make_moe) as (moe, fp8):
        moe_beside_the_oracle(moe, fp8.region)  # a delayed scale knows nothing at first
        fp8.weights_changed()
        found = moe_beside_the_oracle(moe, fp8.region)
    print(kind, "result, gradients of tokens, router, up, down:", found)
    assert found[0] < LAYER[0] and max(found) < LAYER[1]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_cast_once_a_step(kind):
    """What was cast serves until the weights are said to have changed, and then no longer."""
    with in_fp8(kind, make_moe) as (moe, fp8):
        x = torch.randn(GROUPS, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)

        def result():
            with fp8.region():
                return moe(x.requires_grad_(), TOKENS)[0].detach()

        results = []
        for _ in range(3):  # with a scale that knows the weights
            fp8.weights_changed()
            results.append(result())
        with torch.no_grad():
            moe.experts.down.mul_(0.5)
        kept = result()
        with torch.no_grad(), fp8.region():
            drawn = moe(x, TOKENS)[0]  # no backward pass, nothing kept
        fp8.weights_changed()
        changed = result()
    torch.testing.assert_close(kept, results[-1])
    torch.testing.assert_close(changed, 0.5 * kept, rtol=0.1, atol=0.02)
    torch.testing.assert_close(drawn, changed, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_layer_in_fp8_is_torchs(kind):
    def make(spread):
        with torch.device("cuda"):
            return randomized(Ffn(WIDTH, spread)).bfloat16()

    with in_fp8(kind, make) as (ffn, fp8):
        x = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(0)).cuda().bfloat16()
        weights = [ffn.up.weight, ffn.down.weight]
        wide = [w.detach().float().requires_grad_() for w in weights]

        def ours(x):
            with fp8.region():
                return ffn(x)

        def oracle(x):
            return torch.nn.functional.gelu(x @ wide[0].T, approximate="tanh") @ wide[1].T

        gradients(ours, [x], weights)
        fp8.weights_changed()
        found = errors(gradients(ours, [x], weights), gradients(oracle, [x.float()], wide))
    print(kind, "result, gradients of tokens, up, down:", found)
    assert found[0] < LAYER[0] and max(found) < LAYER[1]


@pytest.mark.parametrize("routing", ["dense", "expert_choice"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_fp8_is_the_oracles(kind, routing):
    recipe = Case(Layout(), 1, routing, model=(("width", 256), ("layers", 6), ("group_tokens", 64))).recipe().model
    names = ("layers", "width", "heads", "kv_heads", "routing", "experts", "capacity_factor", "side", "channels")
    oracle = reference.EcDit(reference.Config(**{n: getattr(recipe, n) for n in (*names, "patch", "text_width")}))

    def make(spread):
        with torch.device("cuda"):
            model = EcDit(recipe, spread=spread)
            randomize(model)
        return model.bfloat16()

    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(32, 3, 8, 8, generator=generator), torch.rand(32, generator=generator)
    text, mask = torch.randn(32, 5, 12, generator=generator), torch.ones(32, 5, dtype=torch.bool)
    with in_fp8(kind, make) as (model, fp8):
        oracle.load_state_dict(
            {name: weight.float().cpu() for name, weight in model.state_dict().items()}, strict=False
        )
        for _ in range(2):
            fp8.weights_changed()
            found = model(x.cuda(), t.cuda(), text.cuda(), mask.cuda()).velocity.detach().float().cpu()
    with torch.no_grad():
        expected = oracle(x, t, text, mask, recipe.group_tokens)[0]
    target = torch.randn(expected.shape, generator=generator)
    losses = [reference.flow_loss(velocity, target).item() for velocity in (found, expected)]
    off = errors([found], [expected])[0]
    print(kind, routing, "velocity:", off, "loss:", losses)
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
    assert off < 0.15  # after twelve rounded layers whose sum is larger than what they are added to


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_step(self, trainer, record):
        self.losses.append(record["loss"])

    def on_message(self, message):
        print(message)


def quickstart(folder, name, *changes, steps=300):
    prepare_shapes(folder / "shapes", count=5000, seed=0) if not (folder / "shapes").exists() else None
    recipe = load_recipe(
        "recipes/quickstart.yaml",
        [
            f"data.streams=[{{path: {folder}/shapes}}]", f"run={name}", f"train.steps={steps}", "log.grid_every=0",
            "train.precision=bf16", "checkpoint.every=100", *changes,
        ],
    )  # fmt: skip
    told = Losses()
    assert train(recipe, folder, [told]) == 0
    return told.losses


def test_300_steps_in_fp8_end_where_bf16_ends(tmp_path):
    ends = {}
    for kind in ("none", *KINDS):
        losses = quickstart(tmp_path, kind, f"precision.fp8={kind}")
        ends[kind] = mean(losses[-20:])
    print("mean loss of the last 20 of 300 steps:", ends)
    for kind in KINDS:
        assert ends[kind] == pytest.approx(ends["none"], rel=0.02)


@pytest.mark.parametrize("where", ["[experts, linears]", "[experts]"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_fp8_of_two_micro_batches_is_that_of_one(tmp_path, kind, where):
    """Weights are kept in FP8 between them, and gradients add up within the products."""
    changes = f"precision.fp8={kind}", f"precision.where={where}", "optimizer.schedule=constant"
    one, two = (
        quickstart(tmp_path, f"micro-{size}", *changes, f"train.micro_batch={size}", "train.batch=16", steps=30)
        for size in (16, 8)
    )
    print(kind, where, one[-3:], two[-3:])
    assert two == pytest.approx(one, rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_fp8_is_the_same_as_a_graph(tmp_path, kind):
    curves = [
        quickstart(tmp_path, f"{kind}-{graph}", f"precision.fp8={kind}", f"train.graph={graph}", steps=12)
        for graph in ("false", "true")
    ]
    print(kind, max(abs(a - b) / b for a, b in zip(*curves, strict=True)))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def casts_of(model):
    """Which tensors are the weights in FP8 of its experts."""
    return [id(cast) for _, module in fp8_modules(model) for cast in getattr(module, "weights", [])]


def test_pictures_in_fp8_are_near_those_in_bf16_and_depend_on_no_other(tmp_path):
    quickstart(tmp_path, "run", "optimizer.warmup=1", steps=60)
    run, latents = Run(tmp_path / "run"), {}
    words = ["a red circle", "a blue square", "a green star", "a yellow triangle"]
    for kind in ("none", "block"):
        recipe = sampling_recipe(run, (f"precision.fp8={kind}", "sample.batch=4", "sample.steps=10"))
        with joined(recipe, run) as place:
            sampler, _ = open_sampler(run, recipe, place)
            latents[kind], others = (
                sampler.draw(prompts, [0, 1, 2, 3], recipe.sample).latents for prompts in (words, [words[0], *"abc"])
            )
            assert torch.equal(others[0], latents[kind][0])
            casts = casts_of(sampler.model)
            sampler.draw(words[:1], [0], recipe.sample)
            assert casts_of(sampler.model) == casts and bool(casts) == (kind == "block")
    off = ((latents["block"] - latents["none"]).norm() / latents["none"].norm()).item()
    print("latents in FP8 beside bf16:", off)
    assert 0 < off < 0.2


@pytest.mark.parametrize("kind", ["delayed", "current"])
def test_a_run_in_fp8_resumes_with_its_scales(tmp_path, kind):
    whole = quickstart(tmp_path, "whole", f"precision.fp8={kind}", "optimizer.schedule=constant", steps=16)
    quickstart(tmp_path, "parts", f"precision.fp8={kind}", "optimizer.schedule=constant", steps=8)
    rest = quickstart(tmp_path, "parts", f"precision.fp8={kind}", "optimizer.schedule=constant", steps=16)
    print(kind, whole[8:], rest)
    assert rest == pytest.approx(whole[8:], rel=1e-4)
