"""The model against the oracle, and what a user relies on of its parts."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecdit import EcDit, reference
from ecdit.model.experts import ChunkedFfn, batched_ffn
from ecdit.model.kernels.router import top_tokens
from ecdit.model.moe import Moe
from ecdit.model.router import expert_choice, token_choice
from ecdit.recipe_model import DecoderRecipe, ModelRecipe
from ecdit.statistics import RoutingStatistics
from parallel.spread import Spread

TINY = {
    "layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "experts": 4, "group_tokens": 32,
    "side": 8, "channels": 3, "patch": 2, "text_width": 12, "text_tokens": 5,
}  # fmt: skip


def randomized(recipe: ModelRecipe, dtype=torch.float32) -> EcDit:
    """A model whose projections do not start as zero, so that every path carries a signal."""
    model = EcDit(recipe, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.init_std == 0:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.to(dtype)


def oracle_of(model: EcDit) -> reference.EcDit:
    m = model.recipe
    values = {field.name: getattr(m, field.name) for field in fields(reference.Config)}
    oracle = reference.EcDit(reference.Config(**values)).to(next(model.parameters()).dtype)
    oracle.load_state_dict(model.state_dict())
    return oracle


def inputs(recipe: ModelRecipe, images: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(images, recipe.channels, recipe.side, recipe.side, generator=g)
    text = torch.randn(images, recipe.text_tokens, recipe.text_width, generator=g)
    mask = torch.rand(images, recipe.text_tokens, generator=g) > 0.4
    mask[:, 0] = True
    return x, torch.rand(images, generator=g), text, mask


CHOICES = {"plain": {}, "all layers": {"sparse_layers": "all"}, "unmodulated": {"router_input": "unmodulated"}}


@pytest.mark.parametrize("routing", ["dense", "expert_choice", "token_choice"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_outputs_and_gradients_match_the_oracle(routing, masked, choice):
    recipe = ModelRecipe(**TINY, **CHOICES[choice], routing=routing)
    model = randomized(recipe)
    oracle = oracle_of(model)
    x, t, text, mask = inputs(recipe, images=8)
    keep = torch.rand(8, recipe.tokens).argsort(1)[:, :8].sort(1).values if masked else None
    out = model(x, t, text, mask, keep=keep)
    velocity, aux = oracle(x, t, text, mask, recipe.group_tokens, keep)
    torch.testing.assert_close(out.velocity, velocity, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.aux, aux, rtol=1e-5, atol=1e-6)
    for loss in ((out.velocity**2).mean() + out.aux, (velocity**2).mean() + aux):
        loss.backward()
    theirs = dict(oracle.named_parameters())
    for name, weight in model.named_parameters():
        expected = theirs[name].grad
        assert (weight.grad - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
@given(seed=st.integers(0, 2**20), tie=st.booleans(), experts=st.sampled_from([2, 4, 8]))
@settings(max_examples=20, deadline=None)
def test_moe_layer_matches_the_oracle_in_float64(routing, seed, tie, experts):
    generator = torch.Generator().manual_seed(seed)
    moe = Moe(8, experts, 2.0, routing, Spread()).double()
    with torch.no_grad():
        for weight in moe.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        if tie:  # whole numbers have exact products, so that affinities that ought to be equal are
            moe.router.weight.copy_(torch.randint(-1, 2, (8, experts), generator=generator))
    x = torch.randint(-1, 2, (2, 16, 8), generator=generator).double().requires_grad_()
    out, plan = moe(x, 16)
    weights = [moe.router.weight, moe.experts.up, moe.experts.down]
    as_the_paper_has_them = (moe.router.weight, moe.experts.up.mT, moe.experts.down.mT)
    if routing == "expert_choice":
        expected, aux = reference.expert_choice_moe(x, *as_the_paper_has_them, 2.0), torch.zeros(())
    else:
        expected, aux = reference.token_choice_moe(x, *as_the_paper_has_them, 2.0)
        torch.testing.assert_close(plan.aux, aux)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(out.sin().sum(), [x, *weights])
    theirs = torch.autograd.grad(expected.sin().sum(), [x, *weights])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 7, 600, 2000])
def test_chunked_and_batched_experts_agree(rows):
    g = torch.Generator().manual_seed(rows)
    x, up, down = (torch.randn(*s, generator=g) / 4 for s in ((5, rows, 8), (5, 32, 8), (5, 8, 32)))
    x, up, down = (p.requires_grad_() for p in (x, up, down))
    one, other = ChunkedFfn.apply(x, up, down), batched_ffn(x, up, down)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), (x, up, down)) for y in (one, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 12))
def test_top_tokens_breaks_ties_downwards(seed, values, capacity):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (3, 12), generator=generator) / values
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :capacity]
    assert torch.equal(top_tokens(scores, capacity), expected)


@given(st.integers(0, 2**20), st.sampled_from([1, 2, 4]))
def test_every_expert_gets_exactly_c_tokens_of_every_group(seed, capacity):
    affinity = torch.rand(3, 8, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    plan = expert_choice(affinity, capacity)
    token = plan.token.view(4, 3, capacity)
    assert torch.equal(token // 8, torch.arange(3)[None, :, None].expand_as(token))
    assert all(len(set(row.tolist())) == capacity for row in token.flatten(0, 1))
    assert plan.experts_per_token().sum() == 4 * 3 * capacity


def test_token_choice_drops_and_counts_what_is_over_capacity():
    affinity = torch.tensor([[0.7, 0.2, 0.1]]).repeat(6, 1)[None]  # all tokens want expert 0, then 1
    plan = token_choice(affinity, 4)
    assert plan.filled.view(3, 4).tolist() == [[True] * 4, [True] * 4, [False] * 4]
    assert plan.experts_per_token().tolist() == [2, 2, 2, 2, 0, 0]
    assert plan.gate[~plan.filled].eq(0).all()


def test_routing_is_told_of_all_micro_batches_and_stages():
    layers, generator = [1, 3, 5], torch.Generator().manual_seed(0)
    affinity = torch.rand(2, len(layers), 2, 12, 4, generator=generator).softmax(-1)
    micro_batches = [[expert_choice(of_layer, 3) for of_layer in micro] for micro in affinity]
    sums = []
    for of_stage in ([1], [], [3, 5]):
        told = RoutingStatistics(layers, of_stage, torch.device("cpu"))
        for plans in micro_batches:
            told.add([plan for layer, plan in zip(layers, plans, strict=True) if layer in of_stage])
        sums.append(told.sums())
    record = RoutingStatistics.record(torch.stack(sums).sum(0))
    for i in range(len(layers)):
        count = torch.cat([plans[i].experts_per_token() for plans in micro_batches]).double()
        assert record["unrouted_share"][i] == pytest.approx((count == 0).double().mean().item())
        assert record["experts_per_token"][i] == pytest.approx(count.mean().item())
        assert record["experts_per_token_std"][i] == pytest.approx(count.std(correction=0).item())


def test_a_group_never_sees_another():
    recipe = ModelRecipe(**TINY)
    model = randomized(recipe)
    x, t, text, mask = inputs(recipe, images=4)
    together = model(x, t, text, mask).velocity
    alone = model(x[:2], t[:2], text[:2], mask[:2]).velocity
    torch.testing.assert_close(together[:2], alone, rtol=1e-5, atol=1e-6)


def test_weights_are_a_function_of_seed_and_name():
    recipe = ModelRecipe(**TINY)
    one, same, other = EcDit(recipe, 3).state_dict(), EcDit(recipe, 3).state_dict(), EcDit(recipe, 4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["patch.weight"], other["patch.weight"])
    deeper = EcDit(ModelRecipe(**(TINY | {"layers": 8})), 3).state_dict()
    assert all(torch.equal(one[name], deeper[name]) for name in one)
    # golden: a model of a recipe and seed must stay the same model
    assert one["patch.weight"][0, :3].tolist() == pytest.approx(GOLDEN_PATCH, abs=1e-6)


GOLDEN_PATCH = [0.0139089776, -0.1235975474, 0.2764061689]


def test_the_decoder_sees_the_whole_picture_and_trains():
    recipe = ModelRecipe(**TINY, decoder=DecoderRecipe(layers=2, width=16, heads=2))
    model = randomized(recipe)
    x, t, text, mask = inputs(recipe, images=8)
    keep = torch.arange(0, 16, 2).expand(8, -1)
    for chosen in (keep, None):
        model.zero_grad()
        out = model(x, t, text, mask, keep=chosen)
        assert out.velocity.shape == (8, recipe.tokens, recipe.patch_width)
        out.velocity.square().mean().backward()
        assert all(weight.grad is not None for weight in model.parameters())


def test_bf16_stays_close_to_fp32():
    recipe = ModelRecipe(**TINY, routing="dense")
    x, t, text, mask = inputs(recipe, images=2)
    full = randomized(recipe)(x, t, text, mask).velocity
    half = randomized(recipe, torch.bfloat16)(x, t, text, mask).velocity.float()
    assert (half - full).norm() <= 0.03 * full.norm()


def test_experts_under_bf16_match_the_oracle_on_the_same_routing():
    torch.manual_seed(0)
    moe = Moe(16, 4, 2.0, "expert_choice", Spread())
    with torch.no_grad():
        for weight in moe.parameters():
            weight.normal_(std=0.3)
    moe = moe.bfloat16()
    x = torch.randn(1, 64, 16).bfloat16()
    out, _ = moe(x, 64)
    wide = [w.detach().float() for w in (moe.router.weight, moe.experts.up.mT, moe.experts.down.mT)]
    expected = reference.expert_choice_moe(x.float(), *wide, 2.0)
    assert (out.float() - expected).norm() <= 0.02 * expected.norm()
