"""Draws pictures from a run's averaged weights, and counts where its experts worked.

An image's conditional and unconditional half form one routing group, so a picture depends on its prompt, its seed and
the settings, never on what else was in the batch.

Shapes: `B` images, `S` tokens of an image, `L` text tokens, `c` latent channels; `N` pictures asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ecdit.data.encoders import Autoencoder, TextEncoder, load_checked_autoencoder, load_text_encoder
from ecdit.diffusion.draws import seed_noise
from ecdit.diffusion.patch import unpatchify
from ecdit.diffusion.solver import euler, guide, heun, time_grid
from ecdit.errors import UserError
from ecdit.model.dit import EcDit
from ecdit.recipe import ParallelRecipe, Recipe, SampleRecipe, TrainRecipe
from ecdit.run import Run

SOLVERS = {"euler": euler, "heun": heun}
BATCH = 64  # pictures drawn at once


@dataclass
class Samples:
    """images (N, R, R, 3) uint8. times (V,): where the velocity was asked for; experts (V, layers, N, S): how many
    experts took each token of the conditional half there; empty unless asked for."""

    images: Tensor
    prompts: list[str]
    seeds: list[int]
    times: list[float] = field(default_factory=list)
    experts: Tensor | None = None


class Sampler:
    """A model with its encoders, ready to draw. Where the model is spread over ranks, all of them draw together."""

    def __init__(self, model: EcDit, recipe: Recipe, text_encoder: TextEncoder, autoencoder: Autoencoder):
        self.model, self.recipe = model, recipe
        self.text_encoder, self.autoencoder = text_encoder, autoencoder

    @classmethod
    def from_run(cls, run: Run, device: torch.device | None = None) -> "Sampler":
        """From the averaged weights of the run's newest checkpoint. Raises UserError where there is none."""
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        recipe = run.recipe()
        saved, messages = run.newest_checkpoint()
        if saved is None:
            raise UserError("\n".join([*messages, f"{run.checkpoints}: no checkpoint yet; `ecdit train` makes one"]))
        data = recipe.data
        text_encoder = load_text_encoder(
            data.text_encoder,
            width=recipe.model.text_width,
            tokens=recipe.model.text_tokens,
            device=device,
            dtype=torch.float32,
        )
        model = cls._model(recipe, saved.kind("ema"), device)
        return cls(model, recipe, text_encoder, load_checked_autoencoder(recipe, device))

    @staticmethod
    def _model(recipe: Recipe, weights: dict[str, Tensor], device: torch.device) -> EcDit:
        if recipe.model.grouped or recipe.model.routing == "dense":
            with torch.device("meta"):
                model = EcDit(recipe.model)
            model.load_state_dict(weights, assign=True)
            return model.to(device)
        # megatron-core's layer exists only in a job, here of one rank, and knows states besides its weights
        alone = recipe.model_copy(update={"parallel": ParallelRecipe(), "train": TrainRecipe(precision="bf16")})
        from ecdit.assemble import assemble_model, check_job, start_topology  # imports megatron-core

        place = start_topology(alone)
        check_job(alone, place)
        model = assemble_model(alone, place)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(weights[name])
        return model

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SampleRecipe,
        *,
        count_experts: bool = False,
    ) -> Samples:
        """One picture for each prompt and seed, BATCH at a time."""
        parts = [
            self._draw(list(prompts[i : i + BATCH]), list(seeds[i : i + BATCH]), settings, count_experts)
            for i in range(0, len(prompts), BATCH)
        ]
        experts = torch.cat([part.experts for part in parts], dim=2) if count_experts else None
        images = torch.cat([part.images for part in parts])
        return Samples(images, list(prompts), list(seeds), parts[0].times, experts)

    def _draw(self, prompts: list[str], seeds: list[int], settings: SampleRecipe, count_experts: bool) -> Samples:
        model, device = self.recipe.model, next(self.model.parameters()).device
        wanted, lots = len(prompts), self.model.spread.tensor_ranks
        while len(prompts) % lots:  # tensor ranks share the pictures evenly
            prompts, seeds = [*prompts, prompts[-1]], [*seeds, seeds[-1]]
        # a pair of rows for each picture: its caption, and the empty one
        text, mask = self.text_encoder([caption for prompt in prompts for caption in (prompt, "")])
        times: list[float] = []
        experts: list[Tensor] = []

        def velocity(x: Tensor, t: float) -> Tensor:
            pairs = x.float().repeat_interleave(2, dim=0)
            at = torch.full((len(pairs),), t, device=device)
            out = self.model.infer(pairs, at, text, mask, model.sample_group_tokens)
            if count_experts:
                counts = [plan.experts_per_token().view(-1, 2, model.tokens)[:, 0] for plan in out.plans]
                times.append(t)
                experts.append(torch.stack(counts).to("cpu", torch.uint8))
            with_text, without = out.velocity.float().view(-1, 2, *out.velocity.shape[1:]).unbind(1)
            guided = guide(with_text, without, settings.guidance)
            return unpatchify(guided, model.patch, model.channels)

        noise = seed_noise(seeds, model.channels, model.side, device)
        latents = SOLVERS[settings.solver](velocity, noise, time_grid(settings.steps, settings.shift))
        images = self.autoencoder.decode(latents[:wanted]).permute(0, 2, 3, 1).cpu()
        return Samples(images, prompts[:wanted], seeds[:wanted], times, torch.stack(experts) if count_experts else None)


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
    the seeds, so that rows of a grid differ by their prompt alone. Raises UserError for a folder that is no run.
    """
    sampler = Sampler.from_run(Run(Path(run)))
    chosen = sample_settings(sampler.recipe, **settings)
    pairs = [(prompt, seed + i) for prompt in prompts for i in range(n)]
    return sampler.draw([p for p, _ in pairs], [s for _, s in pairs], chosen, count_experts=count_experts)


def sample_settings(recipe: Recipe, **overrides: object) -> SampleRecipe:
    """The recipe's sampling section with those overrides that are not None. Raises UserError for a bad value."""
    values = recipe.sample.model_dump() | {k: v for k, v in overrides.items() if v is not None}
    try:
        return SampleRecipe.model_validate(values)
    except ValueError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['input']!r}: {first['msg']}") from None
