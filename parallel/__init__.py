"""How training is spread out: ranks, the engine, checkpoints. It knows tensors and groups, nothing of diffusion."""

import warnings

# megatron-core tells of optional packages on import, several times a rank; a user can do nothing with that.
warnings.filterwarnings("ignore", module=r"megatron\.")
# It calls collectives by the names that torch 2.13 deprecates; they work.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
