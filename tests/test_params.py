"""Counts against Table 1 of the paper, and operations against what torch counts."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from ecdit import EcDit
from ecdit.cli import app
from ecdit.model.count import count_parameters, forward_flops, table_recipe
from ecdit.model.sizes import SIZES, table_rows
from ecdit.recipe_model import ModelRecipe
from tests.test_model import TINY, inputs

SPARSE = [(name, size, experts) for name, size, experts in table_rows() if experts]
BILLION = 1e9


def count(size, experts):
    return count_parameters("", table_recipe(size, experts))


def test_ten_models_are_sparse():
    assert len(SPARSE) == 10


@pytest.mark.parametrize(("name", "size", "experts"), SPARSE, ids=lambda value: str(value))
def test_increments_are_the_papers(name, size, experts):
    """Experts over dense; for M, whose depths differ, the experts that idle. Both printed numbers are rounded."""
    printed, ours = SIZES[size].printed, count(size, experts)
    if size == "M":
        assert ours.total / BILLION == pytest.approx(97.22, abs=0.01)
        paper, found = printed["64E"] - printed["activated"], ours.total - ours.activated
    else:
        paper, found = printed[f"{experts}E"] - printed["dense"], ours.total - count(size, 0).total
    assert found / BILLION == pytest.approx(paper, abs=0.0101)


@pytest.mark.parametrize("size", ["XL", "XXL"])
def test_activated_parameters_over_dense_are_the_papers(size):
    """3XL is not among them: the paper's 5.18 counts the second expert of 16 layers, its totals have 21."""
    printed = SIZES[size].printed
    increment = (count(size, 8).activated - count(size, 0).total) / BILLION
    assert increment == pytest.approx(printed["activated"] - printed["dense"], abs=0.0101)


def test_an_expert_has_8_d_squared():
    more, fewer = count("XL", 32), count("XL", 16)
    routers = 14 * 1152 * 16
    assert more.total - fewer.total - routers == 14 * 16 * 8 * 1152**2


def test_params_prints_json_and_refuses_unknown_names():
    done = CliRunner().invoke(app, ["params", "--json"])
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == [name for name, _, _ in table_rows()]
    assert all(set(row) == {"name", "total", "activated", "encoders"} for row in rows)
    assert rows[1]["encoders"] == 704_000_000
    table = CliRunner().invoke(app, ["params", "EC-DiT-M-64E"])
    assert "97.21" in table.stdout and "97.22" in table.stdout and "What differs from the paper" in table.stdout
    refused = CliRunner().invoke(app, ["params", "EC-DiT-S"])
    assert "'EC-DiT-S' is no model of Table 1; valid: DiT-XL" in str(refused.exception)


@pytest.mark.parametrize("routing", ["dense", "expert_choice"])
def test_operations_are_those_that_torch_counts(routing):
    """Less the router, which is not counted; attention is, though torch's counter must be shown plain products."""
    recipe = ModelRecipe(**(TINY | {"routing": routing}))
    model, images = EcDit(recipe, seed=0), 2
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs(recipe, images, seed=0))
    sparse = sum(recipe.sparse(layer) for layer in range(recipe.layers))
    router = 2 * sparse * images * recipe.tokens * recipe.width * recipe.experts
    assert counter.get_total_flops() - router == pytest.approx(images * forward_flops(recipe, recipe.tokens), rel=0.01)
