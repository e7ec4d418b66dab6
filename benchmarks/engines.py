"""A step of EC-DiT-XL-8E under engine megatron and under engine deepspeed, with and without offload, beside the plan.

The measured steps stand against engine megatron's. A row also has what memory was needed and planned, on the GPU and in
the host's memory, and the planned step; the plan's parts are said on standard error. The engines are alone in turn, and
one that fails, such as for want of memory, has a row that says why.
"""

import gc
import resource
import sys

import torch

from benchmarks.harness import Row
from benchmarks.plan import GIB, XL, here, measure, random_recipe
from launcher.plan import Plan, plan
from parallel import topology

MASKED = 0.5
LARGE = XL, {"batch": 128, "micro_batch": 32}
SMALL = (
    {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "experts": 8},
    {"batch": 16, "micro_batch": 8},
)  # on a CPU
ENGINES = {  # keys of a recipe
    "megatron": {},
    "ZeRO-1": {"engine": "deepspeed", "engine_options": {"zero": 1}},
    "ZeRO-2": {"engine": "deepspeed", "engine_options": {"zero": 2}},
    "ZeRO-2, optimizer on the host": {
        "engine": "deepspeed",
        "engine_options": {"zero": 2, "offload_optimizer": "cpu"},
    },
    "ZeRO-3, all on the host": {
        "engine": "deepspeed",
        "engine_options": {"zero": 3, "offload_optimizer": "cpu", "offload_weights": "cpu"},
    },
}


def rows() -> list[Row]:
    """One for each engine, the first of which is what the others stand against."""
    found: list[Row] = []
    model, train = LARGE if torch.cuda.is_available() else SMALL
    for name, keys in ENGINES.items():
        recipe = random_recipe(model, train, MASKED, **keys)
        made = plan(recipe, 1, 1, here())
        _say(name, made)
        try:
            seconds, most, held = measure(recipe)
        except Exception as error:  # libraries' errors are of many kinds
            found.append(Row(name, None, failed=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
            del error
            topology.stop()
            _clean()
            continue
        first = found[0] if found and found[0].milliseconds else None
        against, ratio = (first.name, 1e3 * seconds / first.milliseconds) if first else (None, None)
        found.append(Row(name, 1e3 * seconds, against, ratio, about=_about(made, most, held)))
    return found


def _about(made: Plan, most: int, held: int) -> dict[str, float]:
    parts = made.worst.parts
    planned = made.worst.peak - parts["allocator slack"] - parts["CUDA, cuBLAS, NCCL"]
    found = {
        "ms planned": 1e3 * made.step_seconds,
        "GiB": most / GIB,
        "GiB planned": planned / GIB,
        "GiB that the allocator held": held / GIB,
        "GiB of the host at most so far": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "GiB of the host planned": sum(made.worst.host.values()) / GIB,
    }
    return {what: value for what, value in found.items() if value}


def _say(name: str, made: Plan) -> None:
    seconds = ", ".join(f"{part} {1e3 * value:.0f}" for part, value in made.seconds.items() if value)
    memory = ", ".join(f"{part} {size / GIB:.2f}" for part, size in made.worst.parts.items())
    print(f"{name}: planned ms: {seconds}; planned GiB: {memory}", file=sys.stderr, flush=True)


def _clean() -> None:
    gc.collect()  # hooks and buffers of an engine refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
