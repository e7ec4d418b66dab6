"""The weights that a rank has, from the model's own code on the meta device."""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from ecdit.model.dit import EcDit
from ecdit.recipe_model import ModelRecipe
from launcher.plan.spread import Place, PlannedSpread

# what Transformer Engine may compute, besides experts
LINEAR = re.compile(r"attention\.(qkv|query|out)\.weight$|ffn\.(up|down)\.weight$")


@dataclass(frozen=True)
class Weight:
    """numel: of this rank's block. expert: whether experts'. matrix: more than a vector. linear: attention's or a dense
    layer's."""

    numel: int
    expert: bool
    matrix: bool
    linear: bool


def parameters(model: ModelRecipe, place: Place) -> tuple[Weight, ...]:
    """All that a rank of this stage has."""
    return _parameters(model.model_dump_json(), place)


@lru_cache(maxsize=1024)
def _parameters(model: str, place: Place) -> tuple[Weight, ...]:
    with torch.device("meta"):
        made = EcDit(ModelRecipe.model_validate_json(model), 0, PlannedSpread(place, lambda sent: None))
    return tuple(
        Weight(weight.numel(), weight.expert, weight.ndim > 1, bool(LINEAR.search(name)))
        for name, weight in made.named_parameters()
    )
