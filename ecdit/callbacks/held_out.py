"""The loss on held-out pictures every so often, from the averaged weights: what runs are compared by.

Pictures, noise and times are the same at every evaluation of every run, whatever its seed, so that the differences of
two runs, picture by picture, are free of what makes a step's loss noisy. Every rank computes all pictures, and so the
loss does not depend on the layout.

Shapes: `P` pictures, `b` of them at once, `c` latent channels, `h` latents a side.
"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ecdit.callbacks import Callback
from ecdit.callbacks.metrics import keep_until
from ecdit.data.inputs import Inputs, cache_settings
from ecdit.data.samples import Samples
from ecdit.data.stream import TrainStream
from ecdit.diffusion.flow import interpolate, logit_normal, velocity_loss
from ecdit.diffusion.patch import patchify
from ecdit.errors import UserError
from ecdit.model.dit import EcDit
from ecdit.recipe import Recipe
from parallel.device import to_device
from parallel.philox import key_of, normal, uniform

if TYPE_CHECKING:
    from ecdit.train import Trainer

QUARTERS = 4  # of the pictures by their time, whose losses are told apart


@dataclass
class _Part:
    """Pictures that are computed at once, as tensors on the host: latents and noise (b, c, h, h), t (b,)."""

    latents: Tensor
    text: Tensor
    mask: Tensor
    noise: Tensor
    t: Tensor


class HeldOutLoss(Callback):
    """`held-out.jsonl`: a line an evaluation, with the mean and its standard error over the pictures, and the mean of
    each quarter of the times, from noise to data; `held-out/step-N.npy`: each picture's loss (P,)."""

    every_rank = True  # each has a part of the model

    def check(self, trainer: "Trainer") -> None:
        self._parts = _load(trainer)

    def on_start(self, trainer: "Trainer") -> None:
        if trainer.topology.first and trainer.run.held_out_file.exists():
            keep_until(trainer.run.held_out_file, trainer.progress.step)

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        recipe, step = trainer.recipe, record["step"]
        if step % recipe.log.held_out.every and step != recipe.train.steps:
            return
        with trainer.engine.averaged() as model:
            losses = torch.cat([_losses(model, recipe, part, trainer.topology.device) for part in self._parts])
        if trainer.topology.first:
            times = torch.cat([part.t for part in self._parts])
            self._write(trainer, step, losses.double().cpu().numpy(), times.numpy())

    def _write(self, trainer: "Trainer", step: int, losses: np.ndarray, times: np.ndarray) -> None:
        rows = trainer.run.held_out_file.with_suffix("")
        rows.mkdir(exist_ok=True)
        np.save(rows / f"step-{step}.npy", losses.astype(np.float32))
        quarters = np.array_split(losses[np.argsort(times, kind="stable")], QUARTERS)
        found = {
            "step": step,
            "loss": losses.mean(),
            "error": losses.std(ddof=1) / math.sqrt(len(losses)),
            "by_time": [quarter.mean() for quarter in quarters],
        }
        with trainer.run.held_out_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found, default=float) + "\n")


def draws(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Noise (P, c, h, h), and times (P,) that divide the density of the training times evenly; of no run's seed."""
    model, time, count = recipe.model, recipe.diffusion.time, recipe.log.held_out.pictures
    places = torch.arange(count)
    noise = normal(key_of(0, "held-out noise"), places, model.channels * model.side**2)
    order = uniform(key_of(0, "held-out time"), places, 1)[:, 0].argsort(stable=True).argsort()
    z = torch.special.ndtri((order.double() + 0.5) / count).float()
    return noise.view(count, model.channels, model.side, model.side), logit_normal(z, time.mean, time.std)


def _load(trainer: "Trainer") -> list[_Part]:
    """The pictures as they are computed. Raises UserError where there are too few, or they do not fit the training."""
    recipe, inputs = trainer.recipe, trainer.inputs
    noise, t = draws(recipe)
    parts = []
    for number, samples in enumerate(_samples(trainer)):
        rows = slice(number * recipe.train.micro_batch, (number + 1) * recipe.train.micro_batch)
        parts.append(_Part(*_read(inputs, samples), noise[rows], t[rows]))
    return parts


def _samples(trainer: "Trainer"):
    recipe = trainer.recipe
    held, micro = recipe.log.held_out, recipe.train.micro_batch
    try:
        stream = TrainStream(
            [held.path],
            batch=micro,
            resolution=recipe.data.resolution,
            text_tokens=recipe.model.text_tokens,
            shuffle=False,
            cache=cache_settings(recipe.data),
        )
    except UserError as error:
        raise UserError(f"log.held_out.path: {error}") from None
    if stream.encoded != trainer.stream.encoded:
        raise UserError(f"log.held_out.path: {held.path}: its latents or embeddings are not those of data.streams")
    if stream.samples < held.pictures:
        raise UserError(
            f"log.held_out.pictures: {held.pictures}, but {held.path} has {stream.samples}; "
            f"try {max(micro, stream.samples // micro * micro)}"
        )
    batches = stream.batches(0)
    for _ in range(held.pictures // micro):
        yield next(batches).samples


def _read(inputs: Inputs, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    text, mask = inputs.whole_text(samples)
    latents = inputs.latents(0, samples, torch.arange(len(samples.keys)))
    return latents.cpu(), text.cpu(), mask.cpu()


@torch.no_grad()
def _losses(model: EcDit, recipe: Recipe, part: _Part, device: torch.device) -> Tensor:
    """(b,)."""
    latents, noise, t, text, mask = (
        to_device(x, device) for x in (part.latents, part.noise, part.t, part.text, part.mask)
    )
    x_t, velocity = interpolate(latents, noise, t)
    out = model.infer(x_t, t, text, mask, recipe.model.group_tokens)
    return velocity_loss(out.velocity, patchify(velocity, recipe.model.patch))
