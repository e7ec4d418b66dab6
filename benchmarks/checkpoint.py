"""The step that saves against a plain one, and how long writing and loading take.

The plain steps, the step that begins an asynchronous save and the steps while it is being written are of one run.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import psutil
import torch

from benchmarks.harness import Row, random_batch
from ecdit.assemble import assemble_engine, check_job, start_topology
from ecdit.diffusion.objective import objective, to_differentiate
from ecdit.recipe import Recipe
from ecdit.recipe_io import parse_recipe
from parallel import topology
from parallel.checkpoint.folder import Keep
from parallel.checkpoint.store import CheckpointStore

PLAIN_STEPS = 3
QUICKSTART = {
    "layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "experts": 8, "group_tokens": 256, "patch": 4,
    "channels": 3, "text_width": 64, "text_tokens": 16,
}  # fmt: skip
BILLION = {"layers": 24, "width": 1152, "heads": 18, "kv_heads": 6, "experts": 4, "channels": 3}
MODELS = {"quickstart": (QUICKSTART, 16, 3), "1B": (BILLION, 4, 1)}  # shape, images of a step, rounds
BYTES_A_WEIGHT = 4 + 4 + 16 + 16  # weight, gradient, master and states and average, and their copy


def rows() -> list[Row]:
    """Of each model that fits into this machine's memory; the others are named on standard error."""
    found = []
    for name, (model, images, rounds) in MODELS.items():
        recipe = _recipe(model, images)
        try:
            found += _measure(name, recipe, rounds)
        except MemoryError as error:
            print(f"{name}: {error}", file=sys.stderr)
    return found


def _recipe(model: dict, images: int) -> Recipe:
    values = {
        "run": "bench",
        "model": model,
        "data": {"streams": [{"path": "none"}], "resolution": 32},
        "masking": {"ratio": 0.0},
        "train": {"batch": images, "micro_batch": images, "precision": "fp32"},
    }
    return parse_recipe(values, "the benchmark")


def _measure(name: str, recipe: Recipe, rounds: int) -> list[Row]:
    from ecdit.model.count import count_parameters

    count = count_parameters(name, recipe.model)
    needed, free = (count.total - count.encoders) * BYTES_A_WEIGHT, psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(f"needs {needed / 2**30:.0f} GiB of host memory, {free / 2**30:.0f} are free")
    place = start_topology(recipe)
    check_job(recipe, place)
    engine = assemble_engine(recipe, place)
    batch = random_batch(recipe, recipe.train.batch, place.device)

    def loss(model, micro, hidden):
        per_image, extra, out = objective(model, micro, recipe, hidden)
        return to_differentiate(per_image, extra, out, len(micro.latents), len(micro.latents))

    def step() -> None:
        engine.accumulate([batch], 1, loss, (0, 0, 0))
        engine.update(1e-4)

    with tempfile.TemporaryDirectory(prefix="bench-", dir=".") as folder:
        store = CheckpointStore(Path(folder), place, Keep(1), asynchronous=True, timeout_minutes=10)
        found = _times(name, step, store, engine, rounds)
    topology.stop()
    return found


def _times(name: str, step: Callable[[], None], store: CheckpointStore, engine, rounds: int) -> list[Row]:
    step()
    plain, saving, writing, whole = [], [], [], []
    store.save(0, engine.state(), {})  # the first one makes the buffers
    store.wait()
    for number in range(1, rounds + 1):
        plain += [_seconds(step) for _ in range(PLAIN_STEPS)]
        began = time.perf_counter()
        saving.append(_seconds(lambda number=number: (step(), store.save(number, engine.state(), {}))))
        while store.under_way:
            writing.append(_seconds(step))
        store.wait()
        assert store.ended().error is None
        whole.append(time.perf_counter() - began)
    saved, _ = store.newest()
    load = _seconds(lambda: (saved.load(engine.state()), engine.loaded(1)))
    base = f"{name}: a plain step"
    timed = [
        (base, median(plain), None),
        (f"{name}: the step that saves", median(saving), base),
        (f"{name}: a step while it is written", median(writing or [0.0]), base),
        (f"{name}: save, from its step's start to the commit", median(whole), None),
        (f"{name}: load", load, None),
    ]
    return [Row(n, 1e3 * t, against, t / median(plain) if against else None) for n, t, against in timed]


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
