"""What one micro-batch costs on a pipeline stage of any depth, from traces of two shallow ones.

All blocks of a kind are alike, so everything that is counted grows evenly with the pairs of a dense and a sparse block.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

from ecdit.diffusion.masking import keep_count
from ecdit.recipe import ClusterRecipe, Recipe
from launcher.plan.gpus import Gpu
from launcher.plan.spread import Place
from launcher.plan.trace import PARTS, Trace, trace

SHALLOW, DEEPER = 2, 4  # blocks
IN_FP8 = {"experts": ("experts",), "linears": ("attention", "feed-forward")}  # parts, by `precision.where`
COUNTS = ("peak", "kept", "dispatch", "returned", "kernels")


@dataclass(frozen=True)
class Stage:
    """A micro-batch's forward and backward pass. peak, kept, dispatch, returned: as in `Trace`. seconds: of kernels, by
    part. sent: (calls, their bytes, those of the largest) by (kind, axis, ranks of the group)."""

    peak: float
    kept: float
    dispatch: float
    returned: float
    kernels: float
    seconds: dict[str, float]
    sent: dict[tuple[str, str, int], tuple[float, float, float]]


def stage(recipe: Recipe, place: Place, gpu: Gpu, *, most: bool, device: str = "cuda") -> Stage:
    """The cost of a stage. most: with the most tokens of an image that the masking schedule ever has, else those of its
    first step."""
    tokens = [keep_count(recipe.model.tokens, ratio) for _, ratio in recipe.masking.schedule]
    stages = place.layout.pipeline
    layers = (place.stage + 1) * recipe.model.layers // stages - place.stage * recipe.model.layers // stages
    return _stage(_key(recipe), place, gpu, layers, max(tokens) if most else tokens[0], device)


def _key(recipe: Recipe) -> str:
    """What a stage's cost depends on, as text that can be looked up."""
    return recipe.model_copy(update={"run": "plan", "cluster": ClusterRecipe()}).model_dump_json()


@lru_cache(maxsize=4096)
def _stage(recipe_text: str, place: Place, gpu: Gpu, layers: int, tokens: int, device: str) -> Stage:
    recipe = Recipe.model_validate_json(recipe_text)
    if layers <= DEEPER:
        return _summary(trace(recipe, place, layers, tokens, device), recipe, gpu)
    shallow, deeper = (_summary(trace(recipe, place, n, tokens, device), recipe, gpu) for n in (SHALLOW, DEEPER))
    times = (layers - SHALLOW) / (DEEPER - SHALLOW)

    def grown(low: float, high: float) -> float:
        return low + (high - low) * times

    return Stage(
        *(grown(getattr(shallow, n), getattr(deeper, n)) for n in COUNTS),
        {part: grown(shallow.seconds[part], deeper.seconds[part]) for part in PARTS},
        {
            key: tuple(grown(a, b) for a, b in zip(shallow.sent.get(key, (0, 0, 0)), pair, strict=True))
            for key, pair in deeper.sent.items()
        },
    )


def _summary(found: Trace, recipe: Recipe, gpu: Gpu) -> Stage:
    rate = (gpu.bf16 if recipe.train.precision == "bf16" else gpu.fp32) * gpu.product_share
    in_fp8 = set() if recipe.precision.fp8 == "none" else {p for kind in recipe.precision.where for p in IN_FP8[kind]}
    fp8_rate = gpu.fp8 * gpu.fp8_share or rate
    seconds = dict.fromkeys(PARTS, 0.0)
    for kernel in found.kernels:
        moved = kernel.bytes / (gpu.hbm * gpu.hbm_share)
        reached = fp8_rate if kernel.product and kernel.part in in_fp8 else rate
        seconds[kernel.part] += max(kernel.flops / reached, moved, gpu.kernel_seconds)
    sent = defaultdict(lambda: (0.0, 0.0, 0.0))
    for one in found.sent:
        key = (one.kind, one.axis, one.size)
        calls, size, most = sent[key]
        sent[key] = (calls + 1, size + one.bytes, max(most, one.bytes))
    return Stage(found.peak, found.kept, found.dispatch, found.returned, len(found.kernels), seconds, dict(sent))
