"""How training is spread out: ranks, the engine, checkpoints. It knows tensors and groups, nothing of diffusion."""

import os
import warnings
from importlib.util import find_spec

# megatron-core tells of optional packages on import, several times a rank; a user can do nothing with that.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Where a checkpoint is read or written by one process, that is what is meant.
warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled, unavailable or uninitialized")
# megatron-core calls collectives by the names that torch 2.13 deprecates; they work.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

# Transformer Engine, which megatron-core imports where it is there, takes the system's cuDNN first. Two of them in a
# process break each other, and torch has brought its own.
if find_spec("nvidia") is not None:
    _cudnn = find_spec("nvidia.cudnn")
    if _cudnn is not None:
        os.environ.setdefault("CUDNN_HOME", next(iter(_cudnn.submodule_search_locations)))
