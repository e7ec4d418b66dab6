"""Times functions side by side, so that whatever slows the machine down slows all of them."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch

from ecdit.diffusion.draws import draw
from ecdit.diffusion.objective import MicroBatch
from ecdit.recipe import Recipe


@dataclass
class Row:
    """One timing. `ratio` is milliseconds over those of the row named `against`.

    spread: milliseconds of the fastest and the slowest tenth. failed: why there is no timing. about: other figures of
    it by what they are, with units.
    """

    name: str
    milliseconds: float | None
    against: str | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    failed: str | None = None
    about: dict[str, float] = field(default_factory=dict)


def compare(functions: dict[str, Callable[[], Any]], against: dict[str, str], rounds: int) -> list[Row]:
    """Times the functions in turn, `rounds` times over. A ratio is the median of the ratios within a round."""
    times = in_turn(functions, rounds)
    rows = []
    for name, taken in times.items():
        peer = against.get(name)
        rows.append(Row(name, median(taken), peer, median_ratio(taken, times[peer]) if peer else None))
    return rows


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each function in each of `rounds` rounds, after one call of each that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(milliseconds(function))
    return times


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """The median of the ratios within a round."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def captured(call: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """So many calls of it: on a GPU as one CUDA graph, so that the host does not count, on the current stream or on one
    of its own where that is the default one."""
    if not torch.cuda.is_available():

        def several() -> None:
            for _ in range(calls):
                call()

        return several
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        # one pool for all graphs: none of them reads what another, or its own last replay, has left there
        with torch.cuda.graph(graph, pool=_pool(), stream=stream):
            for _ in range(calls):
                call()
    torch.cuda.current_stream().wait_stream(stream)

    def replay() -> None:
        graph.replay()

    replay.call = call  # a graph knows tensors by their addresses: this keeps them
    return replay


@cache
def _pool() -> tuple[int, int]:
    return torch.cuda.graph_pool_handle()


def random_batch(recipe: Recipe, images: int, device: torch.device) -> MicroBatch:
    """A micro-batch of noise in the recipe's shapes."""
    model = recipe.model
    latents = torch.randn(images, model.channels, model.side, model.side, device=device)
    text = torch.randn(images, model.text_tokens, model.text_width, device=device)
    mask = torch.ones(images, model.text_tokens, dtype=torch.bool, device=device)
    return MicroBatch(latents, text, mask, draw(recipe, 0, torch.arange(images, device=device)))


def device_here() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def milliseconds(function: Callable[[], Any]) -> float:
    """Of one call, until the device has done it."""
    _synchronize()
    began = time.perf_counter()
    function()
    _synchronize()
    return 1e3 * (time.perf_counter() - began)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
