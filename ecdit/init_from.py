"""A run's first weights (`init_from`): of another run, or exported ones; dense ones for a sparse model too.

Weights alone travel: the optimizer, the data order and the step are those of a new run. Only from a run of the other
engine with the same optimizer all of its state comes. Every rank reads its own part, whatever layout the weights were
written from.

Shapes: `E` experts, `D` hidden, `F = 4D` expert hidden.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from ecdit.recipe_model import ModelRecipe
from ecdit.run import Run, flat
from parallel.checkpoint import CheckpointError
from parallel.checkpoint.boxes import Boxes
from parallel.checkpoint.folder import Checkpoint, committed, open_checkpoint, verify

VALID = "a run's folder, or what `ecdit export` wrote: a .safetensors file or a diffusers folder"
# keys that decide what a weight means; all others of the section may differ
SAME = ("layers", "width", "heads", "kv_heads", "patch", "channels", "text_width")
SAME += ("decoder.layers", "decoder.width", "decoder.heads")
SPARSE = {"experts": None, "sparse_layers": "every_second"}  # with what a recipe of before the key meant
TOLD = ("data.text_encoder", "data.autoencoder")  # differing ones are allowed, and told


class Source(Protocol):
    """Where weights are read from. recipe: of the run that they are of; step: of that run."""

    place: str
    recipe: dict[str, Any]
    step: int

    def check(self, part: int, parts: int) -> None:
        """Reads every parts-th file whole. Raises UserError where one is damaged."""

    def fill(self, boxes: dict[str, Boxes]) -> None:
        """Writes into boxes, by parameter."""

    def whole(self, name: str) -> Tensor:
        """One parameter, in fp32."""

    def updates_for(self, recipe: Recipe) -> int:
        """How many updates the optimizer's states are of, where a recipe keeps them; 0: it does not."""


class RunSource:
    """The averaged weights of a run's newest checkpoint: what `ecdit sample` draws with and `ecdit export` writes."""

    def __init__(self, run: Run):
        saved = committed(run.checkpoints)
        if not saved:
            raise UserError(f"init_from: {str(run.folder)!r}: {run.checkpoints} has no checkpoint")
        self._saved: Checkpoint = open_checkpoint(saved[-1])
        self.place, self.step = str(saved[-1]), self._saved.step
        self.recipe = yaml.safe_load(self._saved.meta["recipe"])

    def check(self, part: int, parts: int) -> None:
        problems = verify(self._saved.folder, part, parts)
        if problems:
            raise UserError(f"init_from: {self.place} is broken: {'; '.join(problems)}")

    def fill(self, boxes: dict[str, Boxes]) -> None:
        self._saved.load({f"ema/{name}": of_rank for name, of_rank in boxes.items()})

    def whole(self, name: str) -> Tensor:
        return self._saved.kind("ema", [name])[name]

    def updates_for(self, recipe: Recipe) -> int:
        """How many updates the optimizer's states are of, where a recipe keeps them; 0: it does not."""
        same = self.recipe["optimizer"]["name"] == recipe.optimizer.name
        alike = self.recipe["model"]["routing"] == recipe.model.routing
        return self._saved.meta["updates"] if same and alike and self.recipe["engine"] != recipe.engine else 0

    def fill_all(self, state: dict[str, Boxes]) -> None:
        """Writes weights, averages and optimizer states into what a rank's engine keeps."""
        self._saved.load(state)


class FileSource:
    """Exported weights: safetensors that know their recipe, in one file or several."""

    def updates_for(self, recipe: Recipe) -> int:
        """There are no states."""
        return 0

    def __init__(self, place: Path, files: list[Path]):
        self.place, self._files = str(place), {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    facts = opened.metadata() or {}
                    self._files |= dict.fromkeys(opened.keys(), file)
            except (SafetensorError, OSError) as error:
                raise UserError(f"init_from: {file}: cannot read these weights: {error}") from None
        try:
            self.recipe, self.step = yaml.safe_load(facts["recipe"]), int(facts["step"])
            self.recipe["model"]["routing"]
        except (KeyError, TypeError, ValueError, yaml.YAMLError):
            why = "does not say which model it is of; `ecdit export` writes that"
            raise UserError(f"init_from: {file}: {why}") from None

    def check(self, part: int, parts: int) -> None:
        """There are no checksums to compare; opening has compared sizes."""

    def fill(self, boxes: dict[str, Boxes]) -> None:
        for name, of_rank in boxes.items():
            for offset, values in of_rank.parts:
                with safe_open(self._file(name), "pt") as opened:
                    stored = opened.get_slice(name)
                    _check_shape(self, name, stored.get_shape(), of_rank.size())
                    box = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                    values.copy_(stored[box])

    def whole(self, name: str) -> Tensor:
        with safe_open(self._file(name), "pt") as opened:
            return opened.get_tensor(name).float()

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise UserError(f"init_from: {self.place!r} has no tensor {name}")
        return self._files[name]


def _check_shape(source: Source, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """A box of a smaller tensor would be spread over the whole one."""
    if list(found) != list(wanted):
        raise UserError(f"init_from: {source.place!r} has {name} as {list(found)}; the model has {list(wanted)}")


def open_source(recipe: Recipe) -> Source:
    """What `init_from` names, read no further than its headers, and found to fit.

    Raises UserError where there is nothing of the kind, or where it is of another model, with every differing key.
    """
    place = Path(recipe.init_from).expanduser()
    if (place / "recipe.yaml").exists() and (place / "checkpoints").is_dir():
        source: Source = RunSource(Run(place))
    elif place.is_file():
        source = FileSource(place, [place])
    elif files := sorted((place / "transformer").glob("*.safetensors")):
        source = FileSource(place, files)
    else:
        raise UserError(f"init_from: {recipe.init_from!r}: no weights here; valid: {VALID}")
    _check_fits(recipe.model, source)
    return source


def _check_fits(model: ModelRecipe, source: Source) -> None:
    ours, theirs = flat(model.model_dump(mode="json")), flat(source.recipe["model"])
    differing = [key for key in SAME if ours[key] != theirs.get(key)]
    dense = theirs["routing"] == "dense"
    if not (dense and model.grouped):
        special = "megatron_topk"  # megatron-core names and lays out its weights in its own way
        kinds = [(routing == "dense", routing == special) for routing in (model.routing, theirs["routing"])]
        if kinds[0] != kinds[1]:
            differing.append("routing")
        elif not dense:
            differing += [key for key, default in SPARSE.items() if ours[key] != theirs.get(key, default)]
    if differing:
        lines = [f"  model.{key}: {ours[key]!r} in the recipe, {theirs.get(key)!r} in init_from" for key in differing]
        raise UserError(
            f"init_from: {source.place} is of another model; make these agree (dense weights also fit "
            "expert_choice and token_choice):\n" + "\n".join(lines)
        )


def fill_state(recipe: Recipe, source: Source, state: dict[str, Boxes]) -> list[str]:
    """Writes the weights, and their average, into what a rank's engine keeps; what to tell the user.

    state: "kind/parameter", as in `Engine.state`. Raises UserError where the source lacks a tensor.
    """
    if source.updates_for(recipe):
        try:
            source.fill_all(state)
        except CheckpointError as error:
            raise UserError(f"init_from: {error}") from None
        engines = f"engine: {recipe.engine} in place of {source.recipe['engine']}"
        return [f"Starts from {source.place}, step {source.step}, with its optimizer's states; {engines}."]
    upcycled = recipe.model.routing != "dense" and source.recipe["model"]["routing"] == "dense"
    for kind in ("weights", "ema"):
        boxes = {name.removeprefix(f"{kind}/"): b for name, b in state.items() if name.startswith(f"{kind}/")}
        new = {name: boxes.pop(name) for name in list(boxes) if upcycled and ".moe." in name}
        try:
            source.fill(boxes)
            for name, of_rank in new.items():
                _upcycle(name, of_rank, source, recipe.model)
        except CheckpointError as error:
            raise UserError(f"init_from: {error}") from None
    told = [f"Starts from the averaged weights of {source.place}, step {source.step}; the optimizer is fresh."]
    if upcycled:
        told.append(
            f"Its dense layers became {recipe.model.experts} experts each, with second matrices "
            f"{gate_scale(recipe.model):.4g} times as large; the routers are fresh."
        )
    ours, theirs = flat(recipe.model_dump(mode="json")), flat(source.recipe)
    for key in TOLD:
        if ours[key] != theirs.get(key):
            told.append(f"Starts with another {key}: {ours[key]!r} in the recipe, {theirs.get(key)!r} there.")
    return told


# ---------------------------------------------------------------------------------------------------------- upcycling


def gate_scale(model: ModelRecipe) -> float:
    """What the second matrix of a copied expert is multiplied by, so that a token's gates sum to about one on average.

    Token choice renormalises a token's gates, which sum to one already: 1. Under expert choice the gate is the
    affinity itself. With a fresh router the logits of a normalised token are about N(0, 1), and the affinities
    exp(z) / (E e^(1/2)). An expert takes the share q = f_c / E of the tokens, those with z > z_q, so the gates of a
    token sum, on average, to E times the integral of exp(z) phi(z) / (E e^(1/2)) from z_q, which is Phi(1 - z_q).
    """
    if model.routing == "token_choice":
        return 1.0
    share = model.capacity_factor / model.experts
    normal = NormalDist()
    return 1.0 if share >= 1 else 1 / normal.cdf(1 - normal.inv_cdf(1 - share))


def _upcycle(name: str, boxes: Boxes, source: Source, model: ModelRecipe) -> None:
    """Every expert a copy of the block's dense layer (Komatsuzaki et al. 2023); a router stays as it was drawn.

    An expert's matrices lie as those of a dense layer do; `down` is scaled.
    """
    block, _, part = name.partition(".moe.")
    copies = {"experts.up": ("up", 1.0), "experts.down": ("down", gate_scale(model))}
    if part not in copies:
        return
    dense, scale = copies[part]
    stored = f"{block}.ffn.{dense}.weight"
    whole = source.whole(stored) * torch.tensor(scale)
    _check_shape(source, stored, whole.shape, boxes.size()[1:])
    for (_, *offset), values in boxes.parts:
        box = tuple(slice(o, o + n) for o, n in zip(offset, values.shape[1:], strict=True))
        values.copy_(whole[box].expand_as(values))
