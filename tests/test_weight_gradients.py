"""Weight gradients that products add to their fp32 sum are those of autograd, and cost no pass besides.

Shapes: `o` outputs, `i` inputs, `N` rows, `E` experts.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit import EcDit
from ecdit.model.experts import ChunkedFfn, Experts, batched_ffn
from ecdit.recipe_model import ModelRecipe
from parallel import topology
from parallel.engine.megatron import MegatronEngine
from parallel.layers import Linear
from parallel.spread import Spread
from parallel.spread.ranks import RankSpread
from parallel.topology import Layout
from parallel.weight_gradients import parts, weight_gradient
from tests.layouts import randomize, whole
from tests.ranks import run_on_ranks
from tests.test_engine import NO_STAGES, SETTINGS, loss_of
from tests.test_model import TINY, inputs

RECIPE = ModelRecipe(**(TINY | {"group_tokens": 32}))
IMAGES = 8  # of a step; two fill a group


def summed(weight):
    """The same values with a sum, as megatron-core's DDP makes one."""
    weight = weight.detach().clone().requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
    return weight


def gradients(function, weights, batches):
    """Of every batch's mean square, summed up: those of the weights, by autograd, and of the inputs."""
    of_inputs = []
    for x in batches:
        x = x.detach().requires_grad_()
        function(x, *weights).square().mean().backward()
        of_inputs.append(x.grad)
        for weight in weights:
            if hasattr(weight, "main_grad"):  # what DDP's hook does
                assert weight.grad is not None and weight.grad_added_to_main_grad
                weight.grad = None
    return [getattr(weight, "main_grad", weight.grad) for weight in weights], of_inputs


def assert_same_sums(function, weights, batches, plain=None, tolerance=1e-5):
    ours, own = gradients(function, [summed(weight) for weight in weights], batches)
    exact = [weight.detach().double().requires_grad_() for weight in weights]
    theirs, expected = gradients(plain or function, exact, [x.double() for x in batches])
    for a, b in zip([*ours, *own], [*theirs, *expected], strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    assert all(gradient.dtype == torch.float32 for gradient in ours)


COUNTS = st.integers(1, 9)


@given(sizes=st.tuples(COUNTS, COUNTS, COUNTS), batches=st.integers(1, 4), biased=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_linears_sum_is_autograds(device, sizes, batches, biased):
    (rows, i, o), generator = sizes, torch.Generator().manual_seed(sum(sizes))
    linear = Linear(i, o, bias=biased)
    # rows alone, or with another dimension before them
    xs = [torch.randn(*((2, rows) if b % 2 else (rows,)), i, generator=generator).to(device) for b in range(batches)]
    weight = torch.randn(o, i, generator=generator).to(device)
    bias = {"bias": torch.randn(o, generator=generator).to(device)} if biased else {}

    def function(x, weight):
        values = {"weight": weight, **{name: value.to(x) for name, value in bias.items()}}
        return torch.func.functional_call(linear, values, (x,))

    assert_same_sums(function, [weight], xs)


@pytest.mark.parametrize("ffn", [batched_ffn, ChunkedFfn.apply])
@given(sizes=st.tuples(COUNTS, COUNTS, COUNTS), rows=st.sampled_from([1, 5, 400]), batches=st.integers(1, 3))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_experts_sums_are_autograds(device, ffn, sizes, rows, batches):
    (experts, width, hidden), generator = sizes, torch.Generator().manual_seed(sum(sizes))
    up = torch.randn(experts, hidden, width, generator=generator).to(device)
    down = torch.randn(experts, width, hidden, generator=generator).to(device)
    xs = [torch.randn(experts, rows, width, generator=generator).to(device) for _ in range(batches)]
    plain = lambda x, up, down: F.gelu(x @ up.mT, approximate="tanh") @ down.mT  # noqa: E731
    assert_same_sums(ffn, [up, down], xs, plain, tolerance=1e-4)  # where a single slope of GELU nears zero


@pytest.mark.parametrize("batches", [1, 3])
def test_parts_are_added_to_their_places_whoever_computes_them(device, batches):
    """One by products that know of sums, one by autograd."""
    generator = torch.Generator().manual_seed(batches)
    up = torch.randn(4, 7, 5, generator=generator).to(device)
    down = torch.randn(4, 5, 7, generator=generator).to(device)
    xs = [torch.randn(4, 3, 5, generator=generator).to(device) for _ in range(batches)]

    def function(x, up, down):
        (first, second), (third, fourth) = parts(up, 2), parts(down, 2)
        return torch.cat([batched_ffn(x[:2], first, third), batched_ffn(x[2:], second * 1, fourth * 1)])

    assert_same_sums(function, [up, down], xs)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(384, 256), (4, 384, 256)], ids=["linear", "experts"])
def test_sums_of_bf16_products_are_not_rounded_to_it(shape):
    *experts, o, i = shape
    weight = summed(torch.zeros(shape, device="cuda", dtype=torch.bfloat16))
    exact = torch.zeros(shape, device="cuda", dtype=torch.float64)
    for _ in range(4):
        x, slope = (torch.randn(*experts, 512, n, device="cuda", dtype=torch.bfloat16) for n in (i, o))
        weight_gradient(weight, slope.mT, x)
        exact += slope.mT.double() @ x.double()
    assert (weight.main_grad - exact).norm() <= 1e-5 * exact.norm()


# ------------------------------------------------------------------------------------------------------- the engine


def engine_gradients(layout, recompute="none", chunks=1):
    """Of two equal steps of several micro-batches, on this rank's images; and which weights' products have added
    them."""
    place = topology.start(layout, 1)
    spread = RankSpread(place, dispatch_chunks=chunks)
    model = EcDit(RECIPE, spread=spread, recompute=recompute)
    randomize(model)
    engine = MegatronEngine(model, place, SETTINGS)
    images = IMAGES // place.data_ranks
    part = [tensor[place.data_rank * images :][:images] for tensor in inputs(RECIPE, IMAGES)]
    found = []
    for _ in range(2):
        micro = [[tensor[i : i + 2] for tensor in part] for i in range(0, images, 2)]
        engine.accumulate(micro, len(micro), partial(loss_of, share=2 / IMAGES), NO_STAGES)
        found.append({name: g.clone() for name, g in whole(engine.gradients()).items()})
    added = {name for name, weight in model.named_parameters() if weight.grad_added_to_main_grad}
    topology.stop()
    return found, added


def plain_gradients():
    """By autograd alone, of the whole batch."""
    model = EcDit(RECIPE)
    randomize(model)
    loss_of(model, inputs(RECIPE, IMAGES))[0].backward()
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    experts = {name for name, _ in model.named_parameters() if ".experts." in name}
    return {name: weight.grad for name, weight in model.named_parameters()}, linears, experts


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "moe", "block"])
def test_the_engines_gradients_are_autograds(ranks, recompute):
    expected, linears, experts = plain_gradients()
    for found, added in run_on_ranks(engine_gradients, ranks, Layout(), recompute):
        assert added == linears | experts
        assert_gradients(found, expected)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_experts_in_chunks_add_up_each_in_its_place(chunks, recompute):
    expected, linears, experts = plain_gradients()
    for found, added in run_on_ranks(engine_gradients, 2, Layout(expert=2), recompute, chunks):
        assert added == linears | experts
        assert_gradients(found, expected)


def assert_gradients(found, expected):
    for step in found:
        for name, gradient in expected.items():
            assert (step[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


class Written(TorchDispatchMode):
    """Names of the operations whose result has one of these shapes."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.names = shapes, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape in self.shapes:
            self.names.add(function._schema.name.removeprefix("aten::"))
        return out


@pytest.mark.parametrize(
    ("module", "width", "product"),
    [(Linear(37, 41), 37, "addmm"), (Experts(24, 3, Spread()), 24, "baddbmm_")],
    ids=["linear", "experts"],
)
def test_nothing_but_products_writes_what_is_as_large_as_a_weight(module, width, product):
    place = topology.start(Layout(), 1)
    MegatronEngine(module, place, SETTINGS)  # its hooks are in place
    out = module(torch.randn(15, width)).sum()
    with Written({weight.shape for weight in module.parameters()}) as written:
        out.backward()
    assert written.names - {"detach", "slice"} == {"empty_like", product}
    topology.stop()
