"""What megatron-core needs to run on gloo: two answers, given only where CUDA is absent."""

from types import ModuleType
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules


def prepare() -> None:
    """Lets megatron-core's buffers be allocated on the CPU.

    megatron-core 0.16 asks `torch.cuda.current_device()` where to allocate gradient buffers and sequence-parallel
    results; without CUDA the call raises. Answering "cpu" is all that its DDP and tensor-parallel layers need. Its
    pipeline schedule makes one counter on device "cuda", whose place is not asked for.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")
        schedules.torch = _TorchOnCpu("torch")


class _TorchOnCpu(ModuleType):
    """torch as the schedule sees it: the zeros that it makes are on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *arguments: Any, device: str, **keywords: Any) -> torch.Tensor:
        return torch.zeros(*arguments, **keywords)
