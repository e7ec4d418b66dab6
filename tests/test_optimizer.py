"""The optimizers and the EMA against scalar transcriptions in float64."""

import math

import pytest
import torch

from parallel.engine.adamw import AdamW
from parallel.engine.ema import Ema
from parallel.engine.optimizer import RmspropMomentum, Slice, TorchRmsprop, clip_scale
from parallel.kernels import rmsprop

SHAPES = [7, 12, 1]
STEPS, LR, DECAY = 6, 0.1, 0.3
BUILDS = [lambda slices: RmspropMomentum(slices, SHAPES), TorchRmsprop, AdamW]


def gradients(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(n, generator=generator) for n in SHAPES]


def weights():
    return gradients(1000)


def adastar(decayed):
    """Plain Python: v = EMA(g^2), corrected; u = g / sqrt(v); u /= max(1, rms(u)); m = EMA(u); p -= lr (m + wd p)."""
    p = [w.double().tolist() for w in weights()]
    v, m = ([[0.0] * n for n in SHAPES] for _ in range(2))
    for step in range(1, STEPS + 1):
        for k, g in enumerate(gradients(step)):
            u = []
            for i, gi in enumerate(g.double().tolist()):
                v[k][i] = 0.95 * v[k][i] + 0.05 * gi**2
                u.append(gi / math.sqrt(v[k][i] / (1 - 0.95**step)))
            rms = math.sqrt(sum(x * x for x in u) / len(u))
            for i, ui in enumerate(u):
                m[k][i] = 0.95 * m[k][i] + 0.05 * ui / max(1.0, rms)
                p[k][i] -= LR * (m[k][i] + (DECAY * p[k][i] if decayed[k] else 0.0))
    return p


def classic(decayed):
    """torch.optim.RMSprop, by its documentation: alpha 0.99, momentum 0.9, epsilon 1e-8 outside the root."""
    p = [w.double().tolist() for w in weights()]
    v, b = ([[0.0] * n for n in SHAPES] for _ in range(2))
    for step in range(1, STEPS + 1):
        for k, g in enumerate(gradients(step)):
            for i, gi in enumerate(g.double().tolist()):
                gi += DECAY * p[k][i] if decayed[k] else 0.0
                v[k][i] = 0.99 * v[k][i] + 0.01 * gi**2
                b[k][i] = 0.9 * b[k][i] + gi / (math.sqrt(v[k][i]) + 1e-8)
                p[k][i] -= LR * b[k][i]
    return p


def adamw(decayed):
    """Loshchilov and Hutter 2019, betas 0.9 and 0.999, epsilon 1e-8 outside the root."""
    p = [w.double().tolist() for w in weights()]
    m, v = ([[0.0] * n for n in SHAPES] for _ in range(2))
    for step in range(1, STEPS + 1):
        for k, g in enumerate(gradients(step)):
            for i, gi in enumerate(g.double().tolist()):
                m[k][i] = 0.9 * m[k][i] + 0.1 * gi
                v[k][i] = 0.999 * v[k][i] + 0.001 * gi**2
                p[k][i] -= LR * DECAY * p[k][i] if decayed[k] else 0.0
                p[k][i] -= LR * (m[k][i] / (1 - 0.9**step)) / (math.sqrt(v[k][i] / (1 - 0.999**step)) + 1e-8)
    return p


@pytest.mark.parametrize(("build", "scalar"), [(RmspropMomentum, adastar), (TorchRmsprop, classic), (AdamW, adamw)])
def test_updates_are_the_scalar_form(build, scalar):
    decayed = [True, False, True]
    masters = weights()
    slices = [Slice(master, unit, decay) for unit, (master, decay) in enumerate(zip(masters, decayed, strict=True))]
    sizes = (SHAPES,) if build is RmspropMomentum else ()
    optimizer = build(slices, *sizes, weight_decay=DECAY)
    for step in range(1, STEPS + 1):
        optimizer.step(gradients(step), LR)
    for ours, expected in zip(masters, scalar(decayed), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float32), rtol=2e-5, atol=2e-5)


def test_roots_in_parts_change_no_bit(monkeypatch):
    found = []
    for roots in (5, 1000):
        monkeypatch.setattr(rmsprop, "ROOTS", roots)
        parts = list(rmsprop._batches(weights()))
        assert all(sum(map(len, batch)) <= roots for (batch,) in parts) and len(parts) == (5 if roots == 5 else 1)
        masters = weights()
        optimizer = RmspropMomentum([Slice(m, u, True) for u, m in enumerate(masters)], SHAPES)
        for step in range(STEPS):
            optimizer.step(gradients(step), LR)
        found.append([*masters, *optimizer.states["square"]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_average_takes_in_the_new_weights():
    for build in BUILDS:
        masters, ema, apart = weights(), Ema(weights(), 0.6), Ema(weights(), 0.6)
        optimizer = build([Slice(m, u, False) for u, m in enumerate(masters)])
        for step in range(STEPS):
            optimizer.step(gradients(step), LR, ema)
            apart.update(masters)
        assert ema.updates == STEPS and all(torch.equal(a, b) for a, b in zip(ema.slices, apart.slices, strict=True))


def test_a_gradient_of_zero_changes_nothing():
    masters = weights()
    optimizer = RmspropMomentum([Slice(m, u, False) for u, m in enumerate(masters)], SHAPES)
    optimizer.step([torch.zeros(n) for n in SHAPES], LR)
    assert all(torch.equal(a, b) for a, b in zip(masters, weights(), strict=True))


def test_clipping_scales_to_the_limit_and_leaves_small_gradients():
    gradient = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(gradient * clip_scale(torch.tensor(5.0), 1.0), torch.tensor([0.6, 0.8]))
    assert torch.equal(gradient * clip_scale(torch.tensor(5.0), 6.0), gradient)
    assert not (torch.zeros(2) * clip_scale(torch.tensor(0.0), 1.0)).any()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_scales_gradients_and_writes_the_models_weights(build, dtype):
    """To the same bits as if the gradients had been scaled before and the masters been copied after it."""
    scale, found = torch.tensor(0.3), []
    for apart in (True, False):
        masters, models = weights(), [torch.zeros(n, dtype=dtype) for n in SHAPES]
        optimizer = build(
            [
                Slice(m, u, True, weights=None if apart else w)
                for u, (m, w) in enumerate(zip(masters, models, strict=True))
            ]
        )
        for step in range(STEPS):
            if apart:
                scaled = gradients(step)
                torch._foreach_mul_(scaled, scale)
                optimizer.step(scaled, LR)
                torch._foreach_copy_(models, masters)
            else:
                optimizer.step(gradients(step), LR, scale=scale)
        found.append([*masters, *models])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_ema_is_the_scalar_form():
    ema = Ema([torch.zeros(1)], 0.6)
    expected = 0.0
    for n in range(20):
        decay = min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
        ema.update([torch.tensor([float(n + 1)])])
    assert ema.slices[0].item() == pytest.approx(expected, rel=1e-6)
