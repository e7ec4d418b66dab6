"""What expert choice costs in sampling: EC-DiT against the dense model of its size, as the paper's Figure 4 has it.

A picture's conditional and unconditional half are one routing group. Weights are random, for the time does not depend
on them; encoders are left out, for all models have the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from benchmarks.budget import NOTHING, Asked, Step, Variant, compare
from benchmarks.harness import Row, device_here
from benchmarks.peers import GPU, in_fp8, randomized
from ecdit.model.count import forward_flops
from ecdit.model.dit import EcDit
from ecdit.recipe import Recipe
from ecdit.recipe_io import parse_recipe
from ecdit.sampling import Sampler, sample_settings
from parallel.spread import Spread

QUICKSTART = {
    "layers": 4, "width": 128, "heads": 4, "kv_heads": 4, "group_tokens": 256, "patch": 4, "text_width": 64,
    "text_tokens": 16,
}  # fmt: skip
# shape, and the numbers of experts that are measured against its dense model
MODELS: dict[str, tuple[dict, tuple[int, ...]]] = {"quickstart": (QUICKSTART, (8,))}
if GPU:
    MODELS = {"XL": ({"size": "XL"}, (8, 16, 32)), "XXL": ({"size": "XXL"}, (8,))}
TYPE, PRECISION = (torch.bfloat16, "bf16") if GPU else (torch.float32, "fp32")
PICTURES = 16 if GPU else 4  # at once
STEPS, GUIDANCE = 50 if GPU else 8, 5.0
WARM_UP = 4  # steps of the solver that are not timed
SECONDS = 40.0 if GPU else 8.0


def rows(asked: Asked = NOTHING) -> list[Row]:
    """Milliseconds are of `PICTURES` pictures. The trace is of the first variant."""
    variants: list[Variant] = []
    for size, (shape, counts) in MODELS.items():
        steps = asked.steps or STEPS
        dense = _recipe(shape | {"routing": "dense"})
        base = f"{size} dense, {PICTURES} pictures of {steps} steps"
        cast = {"dense": (dense, base)} if GPU else {}  # drawn in FP8, too
        for experts in counts:
            recipe = _recipe(shape | {"experts": experts})
            name = f"{size}-{experts}E, {PICTURES} pictures of {steps} steps"
            variants.append(_variant(name, recipe, steps, base))
            more = _flops(recipe) / _flops(dense) - 1
            variants[-1].about |= {"overhead of operations": more}
            if GPU and experts == counts[0]:
                cast[f"{experts}E"] = recipe, name
        variants.append(_variant(base, dense, steps, None))
        for kind, (recipe, against) in cast.items():
            variants.append(_variant(f"{size}-{kind}, FP8 block", recipe, steps, against, fp8=True))
    found = compare(asked.pick(variants), asked.seconds or SECONDS, TYPE, asked.trace)
    for row, variant in ((row, variant) for row in found for variant in variants if variant.name == row.name):
        if row.milliseconds is not None:
            row.about["s a picture"] = row.milliseconds / 1e3 / variant.images
        if row.ratio is not None and "overhead of operations" in row.about:
            row.about["overhead"] = row.ratio - 1
    return found


def _variant(name: str, recipe: Recipe, steps: int, against: str | None, *, fp8: bool = False) -> Variant:
    flops = float(_flops(recipe) * 2 * steps * PICTURES)
    return Variant(name, lambda: _drawing(recipe, steps, fp8), against, flops, images=PICTURES, warm_up=0)


def _flops(recipe: Recipe) -> int:
    """Of one evaluation of one half."""
    return forward_flops(recipe.model, recipe.model.tokens)


def _recipe(model: dict) -> Recipe:
    values = {
        "run": "bench",
        "model": {"channels": 3} | model,
        "data": {"streams": [{"path": "none"}], "resolution": 32},
        "masking": {"ratio": 0.0},
        "train": {"precision": PRECISION},
    }
    return parse_recipe(values, "the benchmark")


@contextmanager
def _drawing(recipe: Recipe, steps: int, fp8: bool) -> Iterator[Step]:
    with _model_in_fp8(recipe) if fp8 else nullcontext(_random_model(recipe)) as model:
        yield _sampled(model, recipe, steps)


def _sampled(model: EcDit, recipe: Recipe, steps: int) -> Step:
    sampler = Sampler(model, recipe, _random_text(recipe), None)
    prompts, seeds = [""] * PICTURES, list(range(PICTURES))

    def draw(steps: int) -> None:
        settings = sample_settings(recipe, steps=steps, guidance=GUIDANCE, batch=PICTURES)
        for _ in sampler.denoise(prompts, seeds, settings):
            pass

    draw(WARM_UP)
    return lambda: draw(steps)


@contextmanager
def _model_in_fp8(recipe: Recipe) -> Iterator[EcDit]:
    def build(spread: Spread) -> EcDit:
        with device_here():
            return randomized(EcDit(recipe.model, spread=spread)).to(TYPE)

    with in_fp8("block", build) as (model, fp8):
        fp8.frozen = True
        yield model


@torch.no_grad()
def _random_model(recipe: Recipe) -> EcDit:
    """Made where it computes and as it computes: the largest fills half a GPU in fp32."""
    with torch.device("meta"):
        model = EcDit(recipe.model)
    model = model.to(TYPE).to_empty(device=device_here())
    return randomized(model)


def _random_text(recipe: Recipe):
    """Stands for a text encoder."""
    model, device = recipe.model, device_here()

    def encode(captions: list[str]) -> tuple[Tensor, Tensor]:
        text = torch.randn(len(captions), model.text_tokens, model.text_width, device=device)
        return text, torch.ones(len(captions), model.text_tokens, dtype=torch.bool, device=device)

    return encode
