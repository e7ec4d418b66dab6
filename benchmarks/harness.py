"""Times functions side by side, so that whatever slows the machine down slows all of them."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ecdit.diffusion.draws import draw
from ecdit.diffusion.objective import MicroBatch
from ecdit.recipe import Recipe


@dataclass
class Row:
    """One timing. `ratio` is milliseconds over those of the row named `against`."""

    name: str
    milliseconds: float
    against: str | None = None
    ratio: float | None = None


def compare(functions: dict[str, Callable[[], Any]], against: dict[str, str], rounds: int) -> list[Row]:
    """Times the functions in turn, `rounds` times over. A ratio is the median of the ratios within a round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm-up
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(_milliseconds(function))
    rows = []
    for name, taken in times.items():
        peer = against.get(name)
        pairs = zip(taken, times[peer], strict=True) if peer else ()
        ratio = median(ours / theirs for ours, theirs in pairs) if peer else None
        rows.append(Row(name, median(taken), peer, ratio))
    return rows


def random_batch(recipe: Recipe, images: int, device: torch.device) -> MicroBatch:
    """A micro-batch of noise in the recipe's shapes."""
    model = recipe.model
    latents = torch.randn(images, model.channels, model.side, model.side, device=device)
    text = torch.randn(images, model.text_tokens, model.text_width, device=device)
    mask = torch.ones(images, model.text_tokens, dtype=torch.bool, device=device)
    return MicroBatch(latents, text, mask, draw(recipe, 0, torch.arange(images, device=device)))


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _milliseconds(function: Callable[[], Any]) -> float:
    _synchronize()
    began = time.perf_counter()
    function()
    _synchronize()
    return 1e3 * (time.perf_counter() - began)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
