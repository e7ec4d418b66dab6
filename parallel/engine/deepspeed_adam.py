"""DeepSpeed's own Adam, where it can be built: for the host's memory, and fused for a GPU."""

from functools import cache
from typing import Any

import torch

from parallel.engine.adamw import BETAS, EPSILON, Kernels, torch_kernels


@cache
def whose(device_type: str) -> str:
    """Whose kernels update on such a device: "DeepSpeed", or "torch" and why. Builds what is not built yet."""
    from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder

    builder = (FusedAdamBuilder if device_type == "cuda" else CPUAdamBuilder)()
    try:
        builder.load(verbose=False)
    except Exception as error:  # a missing compiler, a wrong one, no toolkit: torch's does the same
        return f"torch ({type(error).__name__}: {str(error).splitlines()[0]})"
    return "DeepSpeed"


def kernels_for(device: torch.device) -> Kernels:
    """DeepSpeed's for weights there, or torch's."""
    return deepspeed_kernels if whose(device.type) == "DeepSpeed" else torch_kernels


def deepspeed_kernels(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's own, for where the weights are."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if groups[0]["params"][0].is_cuda:
        return FusedAdam(groups, betas=BETAS, eps=EPSILON, adam_w_mode=True)
    return DeepSpeedCPUAdam(groups, betas=BETAS, eps=EPSILON, adamw_mode=True)
