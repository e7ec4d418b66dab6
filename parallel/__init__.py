"""How training is spread out: ranks, the engine, checkpoints. It knows tensors and groups, nothing of diffusion."""

import warnings

# megatron-core tells of optional packages on import, several times a rank; a user can do nothing with that.
warnings.filterwarnings("ignore", module=r"megatron\.")
# Where a checkpoint is read or written by one process, that is what is meant.
warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled, unavailable or uninitialized")
# megatron-core calls collectives by the names that torch 2.13 deprecates; they work.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
