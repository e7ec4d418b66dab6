"""Draws pictures from a run's averaged weights, and counts where its experts worked.

An image's conditional and unconditional half form one routing group, so a picture depends on its prompt, its seed and
the settings, never on what else was in the batch. Nor does its rounding: a forward pass always has `sample.batch`
pictures, filled up where there are fewer. A matrix product of another size is rounded otherwise, by 1e-7; that is
enough for an expert to take another of two tokens that are all but tied, and then the picture is another one. In fp64
it is 1e-16, and no two tokens are that close. The encoders, which stay in fp32, work on one picture at a time.

Shapes: `B` images, `S` tokens of an image, `L` text tokens, `c` latent channels; `N` pictures asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from ecdit.data.encoders import Autoencoder, TextEncoder, load_checked_autoencoder, load_text_encoder
from ecdit.denoising import Count, Denoiser
from ecdit.diffusion.draws import seed_noise
from ecdit.diffusion.solver import time_grid
from ecdit.dtypes import DTYPES
from ecdit.errors import UserError
from ecdit.model.dit import EcDit
from ecdit.prompts import Request, check_seed
from ecdit.recipe import Recipe, SampleRecipe
from ecdit.run import Run


@dataclass
class Samples:
    """images (N, R, R, 3) uint8, decoded from latents (N, c, h, w). times (V,): where the velocity was asked for;
    experts (V, layers, N, S): how many experts took each token of the conditional half there; None unless counted."""

    images: Tensor
    latents: Tensor
    prompts: list[str]
    seeds: list[int]
    times: list[float] = field(default_factory=list)
    experts: Tensor | None = None


def batch_of(settings: SampleRecipe, tensor_ranks: int) -> int:
    """Pictures of a forward pass: as many as asked for, or as the tensor ranks share evenly."""
    return -(-settings.batch // tensor_ranks) * tensor_ranks


class Sampler:
    """A model with its encoders, ready to draw. Where the model is spread over ranks, all of them draw together."""

    def __init__(self, model: EcDit, recipe: Recipe, text_encoder: TextEncoder, autoencoder: Autoencoder):
        self.model, self.recipe = model, recipe
        self.text_encoder, self.autoencoder = text_encoder, autoencoder
        self._denoiser = Denoiser(model, recipe.model)

    @classmethod
    def from_run(cls, run: Run, device: torch.device | None = None) -> "Sampler":
        """On this process alone, from the averaged weights of the run's newest checkpoint.

        Raises UserError where there is none.
        """
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        recipe = run.recipe()
        if recipe.model.routing == "megatron_topk":  # megatron-core's layer exists only in a job, here of one rank
            from ecdit.assemble import start_topology  # imports megatron-core
            from ecdit.sampling_job import open_sampler, sampling_recipe

            alone = sampling_recipe(run, ())
            return open_sampler(run, alone, start_topology(alone))[0]
        saved = run.newest_checkpoint()
        with torch.device("meta"):
            model = EcDit(recipe.model)
        model.load_state_dict(saved.kind("ema"), assign=True)
        return cls.with_encoders(model.to(device, DTYPES[recipe.train.precision]), recipe, device)

    @classmethod
    def with_encoders(cls, model: EcDit, recipe: Recipe, device: torch.device) -> "Sampler":
        """With the recipe's frozen encoders. Raises UserError where they cannot be had or do not fit."""
        text_encoder = load_text_encoder(
            recipe.data.text_encoder,
            width=recipe.model.text_width,
            tokens=recipe.model.text_tokens,
            device=device,
            dtype=torch.float32,
        )
        return cls(model, recipe, text_encoder, load_checked_autoencoder(recipe, device))

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleRecipe,
        *,
        count_experts: bool = False,
    ) -> Samples:
        """One picture for each prompt and seed, `settings.batch` at a time, or as many as tensor ranks share evenly."""
        for seed in seeds:
            check_seed(seed)
        size = self._batch(settings)
        parts = [
            self._draw(list(prompts[i : i + size]), list(seeds[i : i + size]), settings, count_experts)
            for i in range(0, len(prompts), size)
        ]
        experts = torch.cat([part.experts for part in parts], dim=2) if count_experts else None
        images = torch.cat([part.images for part in parts])
        latents = torch.cat([part.latents for part in parts])
        return Samples(images, latents, list(prompts), list(seeds), parts[0].times, experts)

    def _batch(self, settings: SampleRecipe) -> int:
        return batch_of(settings, self.model.spread.tensor_ranks)

    def _draw(self, prompts: list[str], seeds: list[int], settings: SampleRecipe, count_experts: bool) -> Samples:
        wanted = len(prompts)
        counts: list[tuple[float, Tensor]] = []
        count = (lambda t, experts: counts.append((t, experts))) if count_experts else None
        *_, (_, latents) = self.denoise(prompts, seeds, settings, count)
        images = self.decode(latents)[:wanted]
        times, experts = zip(*counts, strict=True) if counts else ((), ())
        taken = torch.stack(experts)[:, :, :wanted] if counts else None
        return Samples(images, latents[:wanted].float().cpu(), prompts, seeds, list(times), taken)

    @torch.no_grad()
    def denoise(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleRecipe,
        count: Count | None = None,
    ) -> Iterator[tuple[float, Tensor]]:
        """(time, latents (B, c, h, w)) after every step of the solver: first those of the prompts and seeds, `B` at
        most, then what fills the batch up.

        `count` is called with (time, experts per token (layers, B, S) uint8) whenever the velocity was asked for."""
        model, device = self.recipe.model, next(self.model.parameters()).device
        missing = self._batch(settings) - len(prompts)
        prompts, seeds = ([*items, *items[-1:] * missing] for items in (list(prompts), list(seeds)))
        # a pair of rows for each picture: its caption, and the empty one
        encoded = {prompt: self.text_encoder([prompt, ""]) for prompt in dict.fromkeys(prompts)}
        text, mask = (torch.cat(parts) for parts in zip(*(encoded[prompt] for prompt in prompts), strict=True))

        latents = seed_noise(seeds, model.channels, model.side, device)
        for step in pairwise(time_grid(settings.steps, settings.shift)):
            latents = self._denoiser(
                latents, step, text, mask, solver=settings.solver, guidance=settings.guidance, count=count
            )
            yield step[1], latents

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> pictures (B, R, R, 3) uint8."""
        images = torch.cat([self.autoencoder.decode(one) for one in latents.split(1)])
        return images.permute(0, 2, 3, 1).cpu()


def sample(
    run: str | Path,
    prompts: Sequence[str],
    *,
    n: int = 1,
    seed: int = 0,
    count_experts: bool = False,
    **settings: object,
) -> Samples:
    """Draws `n` pictures of each prompt from the run folder `run`, prompt by prompt, with seeds seed, seed + 1, ...

    `settings` override the recipe's `sample` section: steps, solver, guidance, shift. The prompts of one call share
    the seeds, so that rows of a grid differ by their prompt alone. Raises UserError for a folder that is no run, and
    where there is nothing to draw.
    """
    prompts = prompts if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"prompts: {prompts!r} is no list of texts; valid: one such as ['a red circle']")
    if not isinstance(n, Integral) or n < 1:
        raise UserError(f"n: {n!r} pictures of each prompt; a whole number, at least 1")
    check_seed(seed)
    asked = [Request(prompt, seed + i) for prompt in prompts for i in range(n)]
    sampler = Sampler.from_run(Run(Path(run)))
    if count_experts and sampler.recipe.model.routing == "dense":
        raise UserError("count_experts: this model is dense (model.routing: dense); it has no experts to count")
    chosen = sample_settings(sampler.recipe, **settings)
    return sampler.draw([r.prompt for r in asked], [r.seed for r in asked], chosen, count_experts=count_experts)


def sample_settings(recipe: Recipe, **overrides: object) -> SampleRecipe:
    """The recipe's sampling section with those overrides that are not None. Raises UserError for a bad value."""
    values = recipe.sample.model_dump() | {k: v for k, v in overrides.items() if v is not None}
    try:
        return SampleRecipe.model_validate(values)
    except ValueError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['input']!r}: {first['msg']}") from None
