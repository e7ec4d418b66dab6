"""DeepSpeed's keys that a recipe may set: how fast it is and what it keeps in memory, never what it computes."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Of a key's values. least: one that is valid."""

    valid: str
    least: Any
    fits: Callable[[Any], bool]


def whole(least: int, multiple: int = 1) -> Kind:
    """Whole numbers."""
    words = f"a whole number from {least} on" + (f", a multiple of {multiple}" if multiple > 1 else "")
    return Kind(words, least, lambda value: type(value) is int and value >= least and value % multiple == 0)


SWITCH = Kind("true or false", False, lambda value: isinstance(value, bool))
ON_A_DISK = {"offload_optimizer": "offload_optimizer", "offload_weights": "offload_param"}  # our key, DeepSpeed's
LEAST_BUFFERS = 5  # in memory, for what comes from a disk: a weight has master, gradient, two states and average there
PREFETCH = "stage3_prefetch_bucket_size"
TUNABLE: dict[str, Any] = {
    "zero_optimization": {
        "reduce_bucket_size": whole(1),
        "allgather_bucket_size": whole(2, multiple=2),
        "overlap_comm": SWITCH,
        "use_multi_rank_bucket_allreduce": SWITCH,
        "sub_group_size": whole(1),
        PREFETCH: whole(0),
        "stage3_param_persistence_threshold": whole(0),
        "stage3_model_persistence_threshold": whole(0),
        "stage3_max_live_parameters": whole(0),
        "stage3_max_reuse_distance": whole(0),
        # of a disk
        "offload_optimizer": {"buffer_count": whole(LEAST_BUFFERS), "fast_init": SWITCH},
        "offload_param": {"buffer_count": whole(LEAST_BUFFERS), "max_in_cpu": whole(0)},
    },
    "aio": {
        "block_size": whole(1),
        "queue_depth": whole(1),
        "intra_op_parallelism": whole(1),
        "single_submit": SWITCH,
        "overlap_events": SWITCH,
    },
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
}


def tunable_fits(config: dict[str, Any], on_disk: set[str]) -> None:
    """on_disk: keys of `engine_options` that are nvme. Raises ValueError("@key: ...") for a key that is not known, a
    value that is not valid, and what means nothing without a disk."""
    _known(config, TUNABLE, "engine_options.config")
    zero = config.get("zero_optimization", {})
    for key, theirs in ON_A_DISK.items():
        if theirs in zero and key not in on_disk:
            place = f"config.zero_optimization.{theirs}"
            raise ValueError(f"@engine_options.{place}: means nothing without engine_options.{key}: nvme")
    if "aio" in config and not on_disk:
        raise ValueError("@engine_options.config.aio: means nothing where nothing is offloaded to nvme")
    if PREFETCH in zero and "offload_weights" in on_disk:
        raise ValueError(
            f"@engine_options.config.zero_optimization.{PREFETCH}: DeepSpeed cannot look ahead with "
            "engine_options.offload_weights: nvme; leave it out"
        )


def _known(values: dict[str, Any], known: dict[str, Any], place: str) -> None:
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid here: {', '.join(known)}"
            raise ValueError(f"@{place}.{key}: is none of DeepSpeed's keys that a recipe may set; {hint}")
        kind = known[key]
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise ValueError(f"@{place}.{key}: {value!r} is no mapping; valid keys: {', '.join(kind)}")
            _known(value, kind, f"{place}.{key}")
        elif not kind.fits(value):
            raise ValueError(f"@{place}.{key}: {value!r} is not valid: {kind.valid}")
