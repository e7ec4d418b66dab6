"""The flow, its density, its solvers and masking, against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from ecdit import load_recipe, reference
from ecdit.diffusion.draws import draw, dropped_captions, seed_noise
from ecdit.diffusion.flow import interpolate, logit_normal, logit_normal_density, velocity_loss
from ecdit.diffusion.masking import (
    gather_tokens,
    keep_count,
    keep_indices,
    mae_loss,
    mae_target,
    ratio_at,
    scatter_tokens,
)
from ecdit.diffusion.patch import patchify, unpatchify
from ecdit.diffusion.solver import euler, guide, heun, time_grid
from ecdit.schedule import learning_rate

MEAN, STD = 0.7, 0.4


def gaussian_velocity(x, t):
    """E[data - noise | x_t = x] for data N(MEAN, STD^2): x_t has mean t MEAN and variance t^2 STD^2 + (1 - t)^2."""
    variance = t**2 * STD**2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2)])
def test_solvers_carry_noise_to_the_gaussian_at_their_order(solver, order):
    """The exact flow of this velocity keeps each point's standard score: x_1 = MEAN + STD x_0."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    steps = [20, 40, 80, 160]
    errors = [(solver(gaussian_velocity, x, time_grid(n)) - (MEAN + STD * x)).abs().max().item() for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.15)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_time_grid_shifts_as_stable_diffusion_3_does(shift):
    grid = time_grid(8, shift)
    assert grid[0] == 0 and grid[-1] == 1 and grid == sorted(grid)
    assert 1 - grid[4] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5))


def test_guidance_extrapolates_from_the_unconditional():
    a, b = torch.tensor([2.0]), torch.tensor([1.0])
    assert [guide(a, b, s).item() for s in (0.0, 1.0, 5.0)] == [1.0, 2.0, 6.0]


@given(st.floats(-2, 2), st.floats(0.3, 2))
def test_logit_normal_density_is_scipys_under_a_change_of_variables(mean, std):
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    expected = stats.norm.pdf(np.log(t / (1 - t)), mean, std) / (t * (1 - t)).numpy()
    np.testing.assert_allclose(logit_normal_density(t, mean, std).numpy(), expected, rtol=1e-9)


def test_logit_normal_density_integrates_to_one_and_times_follow_it():
    def density(t):
        return logit_normal_density(torch.tensor(t, dtype=torch.float64), -0.5, 0.8).item()

    assert integrate.quad(density, 0, 1)[0] == pytest.approx(1, abs=1e-6)
    times = logit_normal(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), -0.5, 0.8)
    below = integrate.quad(density, 0, 0.3)[0]
    assert (times < 0.3).float().mean().item() == pytest.approx(below, abs=0.01)


def test_interpolation_and_loss_are_the_oracles():
    x, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 0.3, 1.0])
    ours, theirs = interpolate(x, eps, t), reference.flow_pair(x, eps, t)
    torch.testing.assert_close(ours, theirs)
    predicted = torch.randn(3, 2, 4, 4)
    loss = velocity_loss(patchify(predicted, 2), patchify(ours[1], 2))
    assert loss.shape == (3,)
    torch.testing.assert_close(loss.mean(), reference.flow_loss(predicted, theirs[1]))


@given(st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_patches_come_back(patch, channels):
    x = torch.randn(2, channels, 8, 8)
    tokens = patchify(x, patch)
    assert torch.equal(tokens, reference.patchify(x, patch))
    assert torch.equal(unpatchify(tokens, patch, channels), x)


@given(st.integers(0, 2**20), st.sampled_from([0.25, 0.5, 0.75]))
def test_masks_keep_the_right_number_and_give_back_their_places(seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    keep = keep_indices(torch.rand(5, 16, generator=generator), keep_count(16, ratio))
    assert keep.shape == (5, 16 * (1 - ratio))
    assert all(row == sorted(set(row)) for row in keep.tolist())
    x, fill = torch.randn(5, 16, 3, generator=generator), torch.zeros(5, 16, 3)
    back = scatter_tokens(gather_tokens(x, keep), keep, fill)
    assert torch.equal(gather_tokens(back, keep), gather_tokens(x, keep))
    assert back.ne(0).any(-1).sum() == keep.numel()


def test_masks_are_uniform_over_tokens():
    keep = keep_indices(torch.rand(4000, 16, generator=torch.Generator().manual_seed(0)), 8)
    counts = torch.bincount(keep.flatten(), minlength=16)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_mask_ratio_follows_its_schedule():
    schedule = [(0, 0.5), (100, 0.25), (200, 0.0)]
    assert [ratio_at(schedule, step) for step in (0, 99, 100, 199, 200, 10**6)] == [0.5, 0.5, 0.25, 0.25, 0, 0]


def test_mae_is_over_the_masked_tokens_alone():
    target = mae_target(torch.randn(2, 4, 12))
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.square().mean(-1), torch.ones(2, 4), atol=1e-4, rtol=0)
    keep = torch.tensor([[0, 1], [2, 3]])
    predicted = target.clone()
    predicted[0, :2] += 9.0  # kept: does not count
    predicted[1, 0] += 2.0  # masked: does
    torch.testing.assert_close(mae_loss(predicted, target, keep), torch.tensor([0.0, 2.0]))


def test_draws_depend_on_the_position_in_the_global_batch_alone():
    recipe = load_recipe("recipes/quickstart.yaml", ["masking.ratio=0.5"])
    whole = draw(recipe, 7, torch.arange(8))
    part = draw(recipe, 7, torch.tensor([5, 2]))
    for name in ("noise", "t", "keep"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[5, 2]]), name
    assert not torch.equal(draw(recipe, 8, torch.arange(8)).noise, whole.noise)
    assert torch.equal(seed_noise([3], 3, 4, torch.device("cpu"))[0], seed_noise([1, 3], 3, 4, torch.device("cpu"))[1])


def test_captions_are_dropped_at_the_rate_asked_for():
    recipe = load_recipe("recipes/quickstart.yaml", ["diffusion.text_drop=0.25"])
    dropped = dropped_captions(recipe, 0, torch.arange(4000))
    assert dropped.sum() == pytest.approx(1000, abs=4 * math.sqrt(750))
    assert torch.equal(dropped_captions(recipe, 0, torch.arange(100, 110)), dropped[100:110])


def test_learning_rate_warms_up_and_ends_as_asked():
    settings = {"lr": 2.0, "warmup": 4, "steps": 12}
    constant = [learning_rate(s, kind="constant", **settings) for s in range(12)]
    assert constant == [0.5, 1.0, 1.5, *[2.0] * 9]
    cosine = [learning_rate(s, kind="cosine", **settings) for s in range(4, 13)]
    assert cosine[0] == 2.0 and cosine[4] == pytest.approx(1.0) and cosine[-1] == pytest.approx(0.0)
