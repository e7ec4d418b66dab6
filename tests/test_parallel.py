"""Every layout trains the model that the oracle is: losses, gradients and weights, on up to eight ranks."""

from functools import cache

import pytest

from parallel.topology import Layout
from tests.layouts import Case, train_cases, train_oracle
from tests.ranks import run_on_ranks

EC, TC, DENSE = "expert_choice", "token_choice", "dense"

# A few of each axis; `-m slow` has them all.
FAST = [
    Case(Layout(expert=8), 8),
    Case(Layout(tensor=2, expert=2, sequence=True), 8, masked=True, accumulation=2),
    Case(Layout(tensor=2, expert=4), 8),
    Case(Layout(pipeline=2, expert=2), 8, routing=TC, accumulation=2),
    Case(Layout(tensor=2, expert=2, expert_tensor=2, sequence=True), 8, chunks=2),
    Case(Layout(tensor=4, expert=4, sequence=True), 8, routing=TC, accumulation=4),
    Case(Layout(tensor=2, pipeline=2, sequence=True), 8, routing=DENSE, recompute="block"),
]


@cache
def oracle(case: Case):
    return train_oracle(case)


def oracle_of(case: Case):
    """The oracle knows nothing of layouts, so many cases share it."""
    return oracle(Case(Layout(), 1, routing=case.routing, masked=case.masked, batch=case.batch, model=case.model))


def assert_parity(case, found, loss_tolerance=1e-5, tolerance=1e-4):
    losses, gradients, weights = found
    expected_losses, expected_gradients, expected_weights = oracle_of(case)
    assert losses == pytest.approx(expected_losses, rel=loss_tolerance), case
    for step, expected in enumerate(expected_gradients):
        assert gradients[step].keys() == expected.keys(), case
        for name, gradient in expected.items():
            difference = (gradients[step][name] - gradient).norm()
            assert difference <= tolerance * gradient.norm(), f"{case}: gradient of {name} in step {step}"
    for name, weight in expected_weights.items():
        difference = (weights[name] - weight).norm()
        assert difference <= tolerance * weight.norm(), f"{case}: {name} after the last step"


def check(cases):
    for case, found in zip(cases, run_on_ranks(train_cases, cases[0].ranks, cases)[0], strict=True):
        assert_parity(case, found)


def test_layouts_train_as_the_oracle():
    check(FAST)
