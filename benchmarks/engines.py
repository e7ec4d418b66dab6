"""A step of EC-DiT-XL-8E under engine megatron and under engine deepspeed, with and without offload, beside the plan.

The measured steps stand against engine megatron's. What memory was planned and needed, and the planned step, are said
on standard error.
"""

import sys

import psutil
import torch

from benchmarks.harness import Row
from benchmarks.plan import GIB, XL, here, measure, random_recipe
from launcher.plan import plan

TRAIN, MASKED = {"batch": 128, "micro_batch": 32}, 0.5
SMALL = {"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "experts": 8}  # for a CPU
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
    model = XL if torch.cuda.is_available() else SMALL
    for name, keys in ENGINES.items():
        recipe = random_recipe(model, TRAIN, MASKED, **keys)
        made = plan(recipe, 1, 1, here())
        seconds, most, held = measure(recipe)
        parts = made.worst.parts
        allocated = made.worst.peak - parts["allocator slack"] - parts["CUDA, cuBLAS, NCCL"]
        resident = psutil.Process().memory_info().rss
        print(
            f"{name}: planned {allocated / GIB:.2f} GiB, needed {most / GIB:.2f} ({allocated / max(most, 1):.3f}), "
            f"the allocator held {held / GIB:.2f}; on the host planned {sum(made.worst.host.values()) / GIB:.1f} GiB, "
            f"{resident / GIB:.1f} resident at the end; step planned {made.step_seconds:.3f} s, measured {seconds:.3f} "
            f"({made.step_seconds / seconds:.3f}); planned "
            + ", ".join(f"{part} {1e3 * value:.0f}" for part, value in made.seconds.items() if value)
            + "; memory "
            + ", ".join(f"{part} {size / GIB:.2f}" for part, size in parts.items()),
            file=sys.stderr,
            flush=True,
        )
        first = found[0] if found else None
        against, ratio = (first.name, 1e3 * seconds / first.milliseconds) if first else (None, None)
        found.append(Row(name, 1e3 * seconds, against, ratio))
    return found
