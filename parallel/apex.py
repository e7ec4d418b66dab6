"""NVIDIA's apex, where it is installed: weight gradients that megatron-core's linears add to their fp32 sum within the
product, as ours do without it (`weight_gradients.py`), and its LayerNorm.

The package index has an unrelated package of the same name; that one is recognised by what it lacks, and never
imported. Apex is used on a GPU alone, and where it is not there everything is computed by torch and Triton.
"""

import importlib
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel import kernels
from parallel.installed import apex_kind

LAYER_NORM = "fused_layer_norm_cuda"


@cache
def _extension(name: str) -> bool:
    return torch.cuda.is_available() and apex_kind() == "nvidia" and find_spec(name) is not None


@cache
def weight_gradients() -> ModuleType | None:
    """The extension whose products add to an fp32 tensor; None where it is not here."""
    name = "fused_weight_gradient_mlp_cuda"
    return importlib.import_module(name) if _extension(name) else None


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, without affine."""
    if x.is_cuda and _extension(LAYER_NORM):
        from apex.normalization.fused_layer_norm import fused_layer_norm

        return fused_layer_norm(x, x.shape[-1:], eps)
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def told_of_norm(device: torch.device) -> list[str]:
    """That LayerNorm is apex's, where it is: Triton's AdaLN, where that is there, does without."""
    if not _extension(LAYER_NORM) or kernels.use_triton(torch.empty(0, device=device)):
        return []
    return ["NVIDIA's apex is here: LayerNorm is its fused one."]


def accumulate_in_products(model: nn.Module) -> str | None:
    """Has megatron-core's linears add their weights' gradients to `main_grad`, which its DDP has made; what to tell of
    it, or None where apex is not here."""
    linears = [module for module in model.modules() if hasattr(module, "gradient_accumulation_fusion")]
    if weight_gradients() is None or not linears:
        return None
    for linear in linears:
        linear.gradient_accumulation_fusion = True
    return f"NVIDIA's apex is here: {len(linears)} split linears add their weights' gradients up within its products."
