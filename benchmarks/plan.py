"""The planner's step time and memory beside what is measured, on the device at hand.

A row is a measured step against the planned one. What memory was planned and needed is said on standard error.
"""

import gc
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from benchmarks.harness import Row, random_batch
from ecdit.assemble import assemble_engine, check_libraries, start_topology
from ecdit.diffusion.objective import objective, to_differentiate
from ecdit.recipe import Recipe
from ecdit.recipe_io import parse_recipe
from launcher.plan import plan
from launcher.plan.gpus import GPUS, Gpu
from parallel import topology

GIB = 2**30
STEPS = 6
XL = {"size": "XL", "experts": 8}
CASES = {  # model, train, masking: what Table 1's models are trained with, as far as one GPU holds them
    "XL-8E": (XL, {"batch": 128, "micro_batch": 64}, 0.5),
    "XL dense": ({"size": "XL", "routing": "dense"}, {"batch": 128, "micro_batch": 64}, 0.5),
    "XL-16E": (XL | {"experts": 16}, {"batch": 64, "micro_batch": 16}, 0.5),
    "XL-8E, recomputed, unmasked": (XL, {"batch": 64, "micro_batch": 64, "recompute": "block"}, 0.0),
    "XXL-8E": (XL | {"size": "XXL"}, {"batch": 32, "micro_batch": 16}, 0.5),
    "XL-8E, small micro-batches": (XL, {"batch": 32, "micro_batch": 8}, 0.5),
    "XXL dense, unmasked": (XL | {"size": "XXL", "routing": "dense"}, {"batch": 32, "micro_batch": 32}, 0.0),
    "XL-8E, token choice": (XL | {"routing": "token_choice"}, {"batch": 128, "micro_batch": 128}, 0.5),
    "XL-8E, MoE recomputed": (XL, {"batch": 128, "micro_batch": 64, "recompute": "moe"}, 0.5),
}


def rows() -> list[Row]:
    """Of each model that the device holds; the others are named on standard error."""
    found = []
    gpu = here()
    for name, (model, train, masked) in CASES.items():
        recipe = random_recipe(model, train, masked)
        made = plan(recipe, 1, 1, gpu)
        if made.margin < 0:
            print(f"{name}: {made.worst.peak / GIB:.1f} GiB do not fit", file=sys.stderr)
            continue
        seconds, most, held = measure(recipe)
        engine = made.worst.peak - made.worst.parts["allocator slack"] - made.worst.parts["CUDA, cuBLAS, NCCL"]
        print(
            f"{name}: planned {engine / GIB:.2f} GiB, needed {most / GIB:.2f} ({engine / max(most, 1):.3f}), "
            f"the allocator held {held / GIB:.2f}; MFU planned {made.mfu:.1%}, "
            f"measured {made.mfu * made.step_seconds / seconds:.1%}; parts "
            + ", ".join(f"{part} {1e3 * value:.1f}" for part, value in made.seconds.items()),
            file=sys.stderr,
            flush=True,
        )
        planned = f"{name}: planned"
        found.append(Row(planned, 1e3 * made.step_seconds))
        found.append(Row(f"{name}: measured", 1e3 * seconds, planned, seconds / made.step_seconds))
    return found


def here() -> Gpu:
    """The table's GPU that this machine has; on a CPU the smallest, whose figures then mean nothing."""
    name = torch.cuda.get_device_name().lower() if torch.cuda.is_available() else ""
    gpu = next((gpu for word, gpu in GPUS.items() if word in name), GPUS["a100"])
    return replace(gpu, gpus_per_node=1)


def random_recipe(model: dict, train: dict, masked: float, **others: Any) -> Recipe:
    """A recipe for `measure`, which needs no data and no encoders. others: further keys."""
    values = {
        "run": "bench",
        "model": {"channels": 3} | model,
        "data": {"streams": [{"path": "none"}], "resolution": 32},
        "masking": {"ratio": masked},
        "train": train,
        **others,
    }
    return parse_recipe(values, "the benchmark")


def measure(recipe: Recipe) -> tuple[float, int, int]:
    """Seconds of a step, the most bytes allocated, and held by the allocator, of its process so far."""
    place = start_topology(recipe)
    check_libraries(recipe, place)
    engine = assemble_engine(recipe, place)
    batch = random_batch(recipe, recipe.train.micro_batch, place.device)
    count = recipe.train.batch // recipe.train.micro_batch

    def loss(model, micro, hidden):
        per_image, extra, out = objective(model, micro, recipe, hidden)
        return to_differentiate(per_image, extra, out, len(micro.latents), recipe.train.batch)

    times = []
    for number in range(STEPS):
        if number == 1 and place.device.type == "cuda":  # what starting took is not a step's
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        engine.accumulate([batch] * count, count, loss, (0, 0, 0))
        engine.update(1e-4)
        if place.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    most = held = 0
    if place.device.type == "cuda":
        most, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    del engine, batch, loss
    topology.stop()
    gc.collect()  # hooks and buffers of the engine refer to each other
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
    return median(times[1:]), most, held
