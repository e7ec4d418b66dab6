"""What DeepSpeed is told, as the JSON that it reads, from a recipe's `engine_options`."""

from dataclasses import dataclass, field
from typing import Any

import torch

BUCKET = 50_000_000  # elements of gradients that are reduced at once; DeepSpeed's default needs ten times the memory
SUB_GROUP = 100_000_000  # elements of weights that stage 3 updates at once
BUFFERS = 5  # of host memory for what comes from a disk: for master, gradient, both states, average at once


@dataclass(frozen=True)
class ZeroOptions:
    """stage: ZeRO's, 0 to 3. offload_*: "none", "cpu" or "nvme", where the optimizer's masters and states, and stage
    3's weights are. nvme: the folder for the latter. pinned: whether offloaded memory is pinned. config: further keys
    of DeepSpeed's JSON."""

    stage: int = 2
    offload_optimizer: str = "none"
    offload_weights: str = "none"
    nvme: str | None = None
    pinned: bool = True
    config: dict[str, Any] = field(default_factory=dict)


class ConfigError(Exception):
    """The job is not as an option needs it. The message names the option."""


def config_of(options: ZeroOptions, dtype: torch.dtype, data_ranks: int, largest: int) -> dict[str, Any]:
    """DeepSpeed's JSON. dtype: of the compute. largest: elements of the largest weight."""
    # DeepSpeed's "memory-efficient" linear, of stage 3, takes the place of torch's in the whole process, and rounds
    # otherwise under bf16
    zero: dict[str, Any] = {
        "stage": options.stage,
        "overlap_comm": False,
        "memory_efficient_linear": False,
        "reduce_bucket_size": BUCKET,
        "sub_group_size": SUB_GROUP,
    }
    if options.stage == 2 and options.offload_optimizer == "none":
        zero["compute_grad_norm"] = False  # the engine has its own; elsewhere DeepSpeed insists
    for key, place in (("offload_optimizer", options.offload_optimizer), ("offload_param", options.offload_weights)):
        if place != "none":
            zero[key] = {"device": place, "pin_memory": options.pinned and torch.cuda.is_available()}
            zero[key] |= {"nvme_path": options.nvme} if place == "nvme" else {}
    if options.offload_optimizer == "nvme":
        zero["offload_optimizer"]["buffer_count"] = BUFFERS
    if options.offload_weights == "nvme":
        # what comes from the disk has room for any weight; without the rest a part of the weights would stay in memory,
        # and DeepSpeed, looking ahead, would read a weight twice that forward and backward pass both wait for
        zero["offload_param"] |= {"buffer_count": BUFFERS, "buffer_size": -(-largest // data_ranks), "max_in_cpu": 0}
        zero["stage3_prefetch_bucket_size"] = 0
    made = {
        # the training loop counts micro-batches, and says which is a step's last
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": data_ranks,
        # the engine decides which step changes nothing; after one that DeepSpeed skips under bf16, offloaded gradients
        # keep what was not finite in them
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "steps_per_print": None,
    }
    return merged(made, options.config)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Of nested mappings."""
    both = {key: merged(base[key], value) for key, value in over.items() if isinstance(base.get(key), dict)}
    return base | over | both
