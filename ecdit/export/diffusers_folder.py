"""A run as a folder that diffusers loads without this package: weights, configuration, and two files of code."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ecdit.data.encoders import load_checked_autoencoder, load_text_encoder
from ecdit.errors import UserError
from ecdit.export.weights import checkpoint_of, follow_umask, write_shards
from ecdit.recipe import Recipe
from ecdit.recipe_model import ModelRecipe
from ecdit.run import Run
from parallel.checkpoint.folder import Checkpoint

HERE = Path(__file__).parent
MODEL, PIPELINE = "modeling_ecdit", "pipeline_ecdit"
INDEX = "model_index.json"
# what the network is made of; the rest of the recipe's section is of training
KEYS = ("layers", "width", "heads", "kv_heads", "routing", "experts", "capacity_factor")
KEYS += ("side", "channels", "text_width", "text_tokens", "sparse_layers", "router_input")


def write_pipeline(run: Run, kind: str, dtype: str, folder: Path) -> int:
    """Writes `folder`, whole or not at all, in place of an earlier export; the step that the weights are of.

    Raises UserError where there is no checkpoint, where the folder holds something else, and for a model that only
    megatron-core computes.
    """
    if folder.exists() and not (folder / INDEX).exists():
        raise UserError(f"{folder}: exists and is no earlier export (it has no {INDEX}); choose another --out")
    recipe = run.recipe()
    if recipe.model.routing == "megatron_topk":
        raise UserError("model.routing: megatron_topk cannot be exported to diffusers; valid: --to safetensors")
    saved = checkpoint_of(run)
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(saved, recipe, kind, dtype, aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return saved.step


def _write(saved: Checkpoint, recipe: Recipe, kind: str, dtype: str, aside: Path) -> None:
    (aside / "transformer").mkdir(parents=True)
    write_shards(saved, kind, dtype, aside / "transformer", "diffusion_pytorch_model")
    _json(aside / "transformer/config.json", _config(recipe.model))
    shutil.copy(HERE / f"{MODEL}.py", aside / "transformer")
    shutil.copy(HERE / f"{PIPELINE}.py", aside)
    _json(aside / INDEX, _index(recipe, aside))
    (aside / "recipe.yaml").write_text(saved.meta["recipe"], encoding="utf-8")
    for file in filter(Path.is_file, aside.rglob("*")):  # the encoders' libraries wrote some of them
        follow_umask(file)


def _config(model: ModelRecipe) -> dict[str, Any]:
    decoder = {f"decoder_{key}": value for key, value in model.decoder.model_dump().items()}
    values = {key: getattr(model, key) for key in KEYS} | {"patch_size": model.patch}
    return {"_class_name": "EcDitTransformer"} | values | decoder


def _index(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Also writes the encoders, where they have weights."""
    data, device = recipe.data, torch.device("cpu")
    text = load_text_encoder(
        data.text_encoder, width=recipe.model.text_width, tokens=recipe.model.text_tokens, device=device
    )
    nothing = {part: [None, None] for part in ("text_encoder", "tokenizer", "vae")}
    return {
        "_class_name": [PIPELINE, "EcDitPipeline"],
        "transformer": [MODEL, "EcDitTransformer"],
        **nothing,
        **{part: ["transformers", name] for part, name in text.save(folder).items()},
        **{part: ["diffusers", name] for part, name in load_checked_autoencoder(recipe, device).save(folder).items()},
        **recipe.sample.model_dump(),
    }


def _json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
