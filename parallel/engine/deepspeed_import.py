"""DeepSpeed, imported where it is used: it takes seconds, finds its accelerator once, and talks on standard output."""

import logging
import os
from importlib.util import find_spec
from types import ModuleType

import torch


def is_installed() -> bool:
    """Whether there is one; nothing of it is run."""
    return find_spec("deepspeed") is not None


def import_deepspeed() -> ModuleType:
    """The library, quiet, on the device that torch has, over the process groups that there are already."""
    if not torch.cuda.is_available():
        # with a CUDA toolkit but no GPU it would look for one
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # collectives through shared memory on a CPU, which it would compile here and now, on every machine anew
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(backend, dist_init_required=False, verbose=False)
    return deepspeed
