"""DeepSpeed, imported where it is used: it takes seconds, finds its accelerator once, and talks on standard output."""

import logging
import os
from contextlib import redirect_stdout
from io import StringIO

import torch


def import_deepspeed() -> None:
    """Has it imported: quiet, and on the device that torch has."""
    if not torch.cuda.is_available():
        # with a CUDA toolkit but no GPU it would look for one
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with redirect_stdout(StringIO()):
        import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # collectives through shared memory on a CPU, which it would compile here and now, on every machine anew
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def has_async_io() -> bool:
    """Whether what reads and writes a disk beside the computing can be built here."""
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with redirect_stdout(StringIO()):
        return AsyncIOBuilder().is_compatible(verbose=False)
