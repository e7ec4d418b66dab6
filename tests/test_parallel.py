"""Every layout trains the model that the oracle is: losses, gradients and weights, on up to eight ranks."""

import shutil
from functools import cache
from itertools import product

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from parallel.topology import Layout
from tests.layouts import Case, train_cases, train_oracle
from tests.ranks import run_on_ranks

EC, TC, DENSE = "expert_choice", "token_choice", "dense"
CHOICES = (("sparse_layers", "all"), ("router_input", "unmodulated"))  # not the paper's

# A few of each axis; `-m slow` runs the whole matrix.
FAST = [
    Case(Layout(expert=8), 8),
    Case(Layout(tensor=2, expert=2, sequence=True), 8, masked=True, accumulation=2),
    Case(Layout(tensor=2, expert=4), 8),
    Case(Layout(pipeline=2, expert=2), 8, routing=TC, accumulation=2),
    Case(Layout(tensor=2, expert=2, expert_tensor=2, sequence=True), 8, chunks=2),
    Case(Layout(tensor=4, expert=4, sequence=True), 8, routing=TC, accumulation=4),  # groups span the tensor ranks
    Case(Layout(tensor=2, pipeline=2, sequence=True), 8, routing=DENSE, recompute="block"),
    Case(Layout(tensor=2, expert=8, sequence=True), 8, accumulation=4, recompute="moe"),  # two tensor groups exchange
    Case(Layout(tensor=2, expert=2, sequence=True), 8, recompute="moe", model=CHOICES),
]

LAYOUTS = [
    (2, Layout(tensor=2)),
    (4, Layout(tensor=4)),
    (2, Layout(expert=2)),
    (4, Layout(expert=4)),
    (8, Layout(expert=8)),
    (8, Layout()),
    (4, Layout(tensor=2, expert=2)),
    (4, Layout(tensor=2, expert=4)),
    (2, Layout(pipeline=2)),
    (4, Layout(pipeline=2, expert=2)),
    (8, Layout(pipeline=2, tensor=2, expert=2)),
    (2, Layout(expert_tensor=2)),
    (4, Layout(tensor=2, expert=2, expert_tensor=2)),
]
MATRIX = [
    Case(layout if not sequence else Layout(**vars(layout) | {"sequence": True}), ranks, routing, masked, accumulation)
    for (ranks, layout), sequence, routing, masked, accumulation in product(
        LAYOUTS, (False, True), (EC, TC, DENSE), (False, True), (1, 2)
    )
    if not (sequence and layout.tensor == 1) and not (routing == DENSE and layout.expert * layout.expert_tensor > 1)
]


@cache
def oracle(case: Case):
    return train_oracle(case)


def oracle_of(case: Case):
    """The oracle knows nothing of layouts, so many cases share it."""
    return oracle(Case(Layout(), 1, routing=case.routing, masked=case.masked, batch=case.batch, model=case.model))


def assert_parity(case, found):
    losses, gradients, weights = found
    expected_losses, expected_gradients, expected_weights = oracle_of(case)
    assert losses == pytest.approx(expected_losses, rel=1e-5), str(case)
    for step, expected in enumerate(expected_gradients):
        assert gradients[step].keys() == expected.keys(), str(case)
        for name, gradient in expected.items():
            difference = (gradients[step][name] - gradient).norm()
            assert difference <= 1e-4 * gradient.norm(), f"{case}: gradient of {name} in step {step}"
    for name, weight in expected_weights.items():
        assert (weights[name] - weight).norm() <= 1e-4 * weight.norm(), f"{case}: {name} after the last step"
        if ".experts." in name:
            assert_experts(case, name, weights[name], weight)


def difference(found, expected):
    """Relative, of all gradients of the first step together."""
    squares = [((found[1][0][n] - g).square().sum(), g.square().sum()) for n, g in expected[1][0].items()]
    ours, theirs = map(sum, zip(*squares, strict=True))
    return (ours / theirs).sqrt().item()


def test_dispatch_in_fp8_is_the_same_in_every_layout_and_near_the_oracle():
    layouts = [
        (Layout(), 1, 1), (Layout(expert=4), 1, 1), (Layout(tensor=2, expert=2, sequence=True), 2, 1),
        (Layout(tensor=4, expert=4, sequence=True), 1, 4), (Layout(tensor=2, expert_tensor=2, expert=2), 1, 1),
    ]  # fmt: skip
    cases = [
        Case(layout, 4, routing, accumulation=accumulation, chunks=chunks, dispatch_fp8=True)
        for routing, (layout, chunks, accumulation) in product((EC, TC), layouts)
    ]
    found = run_on_ranks(train_cases, 4, cases)[0]
    for first in (0, len(layouts)):
        alone = found[first]
        assert alone[0] == pytest.approx(oracle_of(cases[first])[0], rel=5e-2)
        assert 0 < difference(alone, oracle_of(cases[first])) < 5e-2
        for case, other in zip(cases[first + 1 :], found[first + 1 : first + len(layouts)], strict=False):
            assert other[0] == pytest.approx(alone[0], rel=1e-4), str(case)
            assert difference(other, alone) < 1e-3, str(case)


def assert_experts(case, name, found, expected):
    """All experts are there, each is the oracle's of its number, and no other one."""
    for e, expert in enumerate(found):
        apart = (expected - expert).flatten(1).norm(dim=1)
        assert apart.argmin() == e and apart[e] <= 1e-4 * expert.norm(), f"{case}: expert {e} of {name}"
        assert apart.sort().values[1] > 0.1 * expert.norm(), f"{case}: expert {e} of {name} is there twice"


def check(cases):
    found = run_on_ranks(train_cases, cases[0].ranks, cases)[0]
    for case, of_case in zip(cases, found, strict=True):
        assert_parity(case, of_case)


def test_layouts_train_as_the_oracle():
    check(FAST)


COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler, which torch.compile uses on a CPU")


@COMPILER
def test_compiled_blocks_train_as_the_oracle():
    check([Case(Layout(), 1, EC, masked=True, accumulation=2, compiled=True)])


@COMPILER
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(Layout(), 1, TC, recompute="block", compiled=True),
        Case(Layout(), 1, recompute="moe", compiled=True),
        Case(Layout(tensor=2), 2, compiled=True),
        Case(Layout(expert=2), 2, chunks=2, compiled=True),
        Case(Layout(pipeline=2), 2, accumulation=2, compiled=True),
    ],
    ids=str,
)
def test_compiled_blocks_train_as_the_oracle_in_any_layout(case):
    check([case])


@pytest.mark.slow
@pytest.mark.parametrize("layout", range(len(LAYOUTS)), ids=lambda i: str(Case(LAYOUTS[i][1], LAYOUTS[i][0])))
def test_the_whole_matrix_trains_as_the_oracle(layout):
    ranks, sizes = LAYOUTS[layout]
    same = vars(sizes) | {"sequence": None}
    check([case for case in MATRIX if case.ranks == ranks and vars(case.layout) | {"sequence": None} == same])


@st.composite
def cases(draw):
    """A layout of at most four ranks that divides, and a model that it divides."""
    tensor = draw(st.sampled_from([1, 2]))
    pipeline = draw(st.sampled_from([1, 2] if tensor == 1 else [1]))
    expert, expert_tensor = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (4 // pipeline, 1), (2 // pipeline, 2)]))
    layout = Layout(tensor, expert, expert_tensor, pipeline, draw(st.booleans()) and tensor > 1)
    model = {
        "width": draw(st.sampled_from([16, 32])),
        "experts": draw(st.sampled_from([4, 8])),
        "heads": 4,
        "kv_heads": draw(st.sampled_from([2, 4])),
        "text_tokens": draw(st.integers(3, 7)),  # over a single one, a query's gradient is nothing but rounding
        "layers": draw(st.sampled_from([2, 4])),
    }
    routing = draw(st.sampled_from([EC, TC]))
    here = model["experts"] // expert
    chunks = draw(st.sampled_from([n for n in (1, 2) if here % n == 0]))
    return Case(
        layout, 4, routing, draw(st.booleans()), draw(st.sampled_from([1, 2, 4])), chunks,
        draw(st.sampled_from(["none", "moe", "block"])), batch=16, model=tuple(sorted(model.items())),
    )  # fmt: skip


# shrinking would start a job for every try
@settings(
    max_examples=3, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(st.lists(cases(), min_size=6, max_size=6))
def test_random_layouts_train_as_the_oracle(drawn):
    """One job for some of them, since starting one takes longer than training."""
    usable = [case for case in drawn if case.micro_batch % max(2, case.layout.tensor) == 0]
    if usable:
        check(usable)
