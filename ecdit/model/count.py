"""Parameters and floating-point operations of a model, part by part.

Shapes: `K` tokens of an image that enter the backbone, `S` all of them, `L` text tokens, `D` hidden, `E` experts.
"""

from dataclasses import dataclass

import torch

from ecdit.model.dit import EcDit
from ecdit.model.sizes import ENCODER_PARAMETERS, SIZES
from ecdit.recipe_model import ModelRecipe


@dataclass(frozen=True)
class Count:
    """Parameters, encoders in, as Table 1 counts them. `activated`: an expert counts capacity_factor / E."""

    name: str
    total: int
    activated: int
    encoders: int


def count_parameters(name: str, recipe: ModelRecipe) -> Count:
    """Counts the model itself, built without weights on the meta device."""
    with torch.device("meta"):
        model = EcDit(recipe)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if p.expert)
    idle = experts - int(experts * recipe.capacity_factor / recipe.experts)
    return Count(name, total + ENCODER_PARAMETERS, total - idle + ENCODER_PARAMETERS, ENCODER_PARAMETERS)


def table_recipe(size: str, experts: int) -> ModelRecipe:
    """The model of one cell of Table 1; 0 experts: the dense one."""
    routing = {"routing": "expert_choice", "experts": experts} if experts else {"routing": "dense"}
    shape = SIZES[size]
    return ModelRecipe(
        size=size,
        layers=shape.depth(routing["routing"]),
        width=shape.width,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        **routing,
    )


def forward_flops(recipe: ModelRecipe, tokens: int) -> int:
    """Operations of one image's forward pass with `tokens` K in the backbone: matrix products alone, 2 a multiply-add.

    The router and whatever a routing needs besides products of the paper's mathematics is not counted, so a
    utilisation computed from this is not raised by overhead. A training step does three times as many.
    """
    d = recipe.width
    kv = 2 * recipe.kv_heads * (d // recipe.heads)
    sparse = sum(recipe.sparse(layer) for layer in range(recipe.layers))
    dense_ffns = recipe.layers - sparse + recipe.capacity_factor * sparse
    per_token = recipe.layers * (d * (d + kv) + 3 * d * d) + dense_ffns * 8 * d * d + recipe.patch_width * d
    attention = 2 * d * (tokens + recipe.text_tokens) * recipe.layers
    per_text_token = recipe.text_width * d + d * d + recipe.layers * d * kv
    per_image = recipe.layers * 4 * d * d + (256 + d) * d
    head = _decoder(recipe, tokens) if recipe.decoder.layers else tokens * recipe.patch_width * d + 2 * d * d
    products = tokens * (per_token + attention) + recipe.text_tokens * per_text_token + per_image + head
    return int(2 * products)


def _decoder(recipe: ModelRecipe, tokens: int) -> int:
    """Multiply-adds of the decoder, which sees all tokens of an image, and of the head behind it."""
    d, w, layers = recipe.width, recipe.decoder.width, recipe.decoder.layers
    per_token = layers * (14 * w * w + 2 * w * (recipe.tokens + recipe.text_tokens)) + recipe.patch_width * w
    per_text_token = d * w + layers * 2 * w * w
    per_image = layers * 4 * w * w + 2 * d * d + d * w + 2 * d * w
    return tokens * d * w + recipe.tokens * per_token + recipe.text_tokens * per_text_token + per_image
