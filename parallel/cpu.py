"""What megatron-core needs to run on gloo: one line, applied only where CUDA is absent."""

import torch


def prepare() -> None:
    """Lets megatron-core's buffers be allocated on the CPU.

    megatron-core 0.16 asks `torch.cuda.current_device()` where to allocate gradient buffers and sequence-parallel
    results; without CUDA the call raises. Answering "cpu" is all that its DDP and tensor-parallel layers need.
    """
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")
