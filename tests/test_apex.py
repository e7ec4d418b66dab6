"""NVIDIA's apex: chosen where it is, with the gradients that torch has; the other package of that name left alone."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ecdit import EcDit
from ecdit.recipe_model import ModelRecipe
from parallel import apex, kernels, topology
from parallel.engine.megatron import MegatronEngine
from parallel.spread.ranks import RankSpread
from parallel.topology import Layout
from tests.layouts import whole, whole_kind
from tests.ranks import run_on_ranks
from tests.test_engine import NO_STAGES, SETTINGS, loss_of
from tests.test_model import TINY, inputs

HERE = apex.weight_gradients() is not None


def added(rows, grads, total):
    """What the extension does: total (o, i) += grads (N, o)^T rows (N, i), in fp32."""
    total += grads.T.float() @ rows.float()


def train(extension):
    """Gradients of one step of two micro-batches, and weights after it; what the engine told."""
    apex.weight_gradients = lambda: extension and SimpleNamespace(wgrad_gemm_accum_fp32=extension)
    recipe = ModelRecipe(**(TINY | {"group_tokens": 32}))
    place = topology.start(Layout(tensor=2), 1)
    engine = MegatronEngine(EcDit(recipe, seed=1, spread=RankSpread(place)), place, SETTINGS)
    if extension:  # megatron-core's linears hold the extension themselves
        from megatron.core.tensor_parallel import layers

        layers.fused_weight_gradient_mlp_cuda = apex.weight_gradients()
        torch.cuda.current_device = lambda: torch.device("cpu")
    batches = [inputs(recipe, 4, seed=seed) for seed in (0, 1)]
    engine.accumulate(batches, 2, loss_of, NO_STAGES)
    gradients = whole(engine.gradients())
    engine.update(0.01)
    weights = whole_kind(engine, "weights")
    topology.stop()
    return gradients, weights, engine.told


def test_gradients_that_a_product_adds_up_are_those_of_torch():
    plain, _, silent = run_on_ranks(train, 2, None)[0]
    gradients, _, told = run_on_ranks(train, 2, added)[0]
    assert silent == [] and "NVIDIA's apex is here" in told[0]
    for name, gradient in plain.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.skipif(not HERE, reason="NVIDIA's apex is not here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_its_products_are_torchs(dtype):
    rows, grads = (torch.randn(512, n, device="cuda", dtype=dtype) for n in (256, 384))
    total = torch.randn(384, 256, device="cuda")
    expected = total.clone()
    added(rows, grads, expected)
    apex.weight_gradients().wgrad_gemm_accum_fp32(rows, grads, total)
    torch.testing.assert_close(total, expected, rtol=1e-2, atol=1e-1)


@pytest.mark.skipif(not HERE, reason="NVIDIA's apex is not here")
def test_its_norm_is_torchs():
    x = torch.randn(8, 64, 1152, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(apex.layer_norm(x, 1e-6), F.layer_norm(x, x.shape[-1:], eps=1e-6), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("here", "triton", "told"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_its_norm_is_told_of_where_it_is_used(monkeypatch, here, triton, told):
    monkeypatch.setattr(apex, "_extension", lambda name: here)
    monkeypatch.setattr(kernels, "use_triton", lambda tensor: triton)
    assert len(apex.told_of_norm(torch.device("cpu"))) == told


def test_the_unrelated_package_is_left_alone(tmp_path, monkeypatch):
    for name in ("apex", "apex/lib", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    apex._extension.cache_clear()
    apex.weight_gradients.cache_clear()
    try:
        assert apex.weight_gradients() is None
        x = torch.randn(2, 3)
        assert torch.equal(apex.layer_norm(x, 1e-6), F.layer_norm(x, (3,), eps=1e-6))
        assert "apex" not in sys.modules
    finally:
        apex._extension.cache_clear()
        apex.weight_gradients.cache_clear()
