"""The oracle against the paper: Algorithm 1 and GShard's gating, transcribed with one-hot tensors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ecdit import reference


def algorithm_1(x, w_router, w1, w2, capacity):
    """Algorithm 1 of the paper, its einsums letter by letter; b is a group, s a token of it."""
    logits = torch.einsum("bsd,de->bse", x, w_router)
    affinity = torch.einsum("bse->bes", torch.softmax(logits, dim=-1))
    # top_k with ties to the lower index: a stable sort by descending value
    gating, index = (part[..., :capacity] for part in torch.sort(affinity, dim=-1, descending=True, stable=True))
    dispatch = F.one_hot(index, x.shape[1]).to(x.dtype)  # (b, e, c, s)
    x_in = torch.einsum("becs,bsd->becd", dispatch, x)
    x_e = [F.gelu(x_in[:, e] @ w1[e], approximate="tanh") @ w2[e] for e in range(w1.shape[0])]
    x_e = torch.stack(x_e, dim=1)
    return torch.einsum("becs,bec,becd->bsd", dispatch, gating, x_e)


def gshard(x, w_router, w1, w2, capacity):
    """Algorithm 1 of GShard (Lepikhin et al. 2020), greedily, with its loss, without random dispatch."""
    groups, tokens, _ = x.shape
    experts = w1.shape[0]
    gates = torch.softmax(x @ w_router, dim=-1)
    first = gates.argmax(-1)
    second = gates.masked_fill(F.one_hot(first, experts).bool(), -1).argmax(-1)
    combine = torch.zeros(groups, tokens, experts, dtype=x.dtype)
    loss = 0.0
    for g in range(groups):
        used = [0] * experts
        loss = loss + experts * sum((first[g] == e).double().mean() * gates[g, :, e].mean() for e in range(experts))
        for choice in (first, second):
            for t in range(tokens):
                e = int(choice[g, t])
                if used[e] < capacity:
                    both = gates[g, t, first[g, t]] + gates[g, t, second[g, t]]
                    combine = combine.clone()
                    combine[g, t, e] = gates[g, t, e] / both
                used[e] += 1
    every = torch.stack([F.gelu(x @ w1[e], approximate="tanh") @ w2[e] for e in range(experts)], dim=2)
    return torch.einsum("gte,gted->gtd", combine, every), loss / groups


@st.composite
def layers(draw):
    """Weights and tokens of a random layer in float64.

    Half of the layers have whole numbers for tokens and router, whose products are exact in any order of summation,
    so that affinities that ought to be equal are.
    """
    experts = draw(st.sampled_from([1, 2, 3, 4, 8]))
    capacity = draw(st.integers(1, 4))
    factor = draw(st.sampled_from([f for f in (1, 2) if f <= experts]))
    tokens = experts * capacity  # so that C = tokens * factor / experts is whole
    groups, width = draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def whole(*shape):
        return torch.randint(-1, 2, shape, generator=generator).double()

    kind = whole if draw(st.booleans()) else normal
    x, router = kind(groups, tokens, width), kind(width, experts)
    weights = (router, normal(experts, width, 4 * width), normal(experts, 4 * width, width))
    return x, *weights, float(factor)


def gradients(out, inputs, cotangent):
    return torch.autograd.grad((out * cotangent).sum(), inputs, allow_unused=True)


@given(layers())
@settings(max_examples=60, deadline=None)
def test_expert_choice_is_algorithm_1(layer):
    *inputs, factor = layer
    inputs = [tensor.requires_grad_() for tensor in inputs]
    tokens, experts = inputs[0].shape[1], inputs[2].shape[0]
    ours = reference.expert_choice_moe(*inputs, factor)
    paper = algorithm_1(*inputs, int(tokens * factor / experts))
    torch.testing.assert_close(ours, paper, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(gradients(ours, inputs, cotangent), gradients(paper, inputs, cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@given(layers())
@settings(max_examples=40, deadline=None)
def test_token_choice_is_gshard(layer):
    *inputs, factor = layer
    if inputs[2].shape[0] < 2:
        return  # top-2 needs two experts
    inputs = [tensor.requires_grad_() for tensor in inputs]
    capacity = int(inputs[0].shape[1] * factor / inputs[2].shape[0])
    ours, aux = reference.token_choice_moe(*inputs, factor)
    paper, loss = gshard(*inputs, capacity)
    torch.testing.assert_close(ours, paper, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(aux, loss, rtol=1e-12, atol=1e-12)
    mine, theirs = (torch.autograd.grad(out.sum() + more, inputs) for out, more in ((ours, aux), (paper, loss)))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_equal_affinities_go_to_the_lower_token():
    scores = torch.full((1, 6, 2), 0.5)
    gates, index = reference.expert_choice(scores, 3)
    assert index.tolist() == [[[0, 1, 2], [0, 1, 2]]]
    assert gates.tolist() == [[[0.5] * 3] * 2]


def test_a_token_that_nobody_takes_gets_zero():
    x = torch.eye(4, dtype=torch.float64)[None]
    w_router = torch.tensor([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    w_router = torch.cat([w_router, torch.zeros(4, 1, dtype=torch.float64)], dim=1)[:, [0, 2]]
    w1, w2 = torch.ones(2, 4, 16, dtype=torch.float64), torch.ones(2, 16, 4, dtype=torch.float64)
    out = reference.expert_choice_moe(x, w_router, w1, w2, 0.5)  # each expert takes one token of four
    assert (out[0].abs().sum(-1) > 0).sum() == 2


def test_flow_runs_from_noise_to_data():
    x, eps = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    x_t, v = reference.flow_pair(x, eps, torch.tensor([0.0, 1.0]))
    assert torch.equal(x_t[0], eps[0]) and torch.equal(x_t[1], x[1])
    assert torch.equal(v, x - eps)
    assert reference.flow_loss(v, torch.zeros_like(v)) == pytest.approx(1.0)
