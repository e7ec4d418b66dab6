"""One step of the sampling ODE with guidance, on a GPU as a CUDA graph.

Every step of every batch does the same work on tensors of the same shapes, since expert choice's are static: so the
host, which takes longer to launch a small model's kernels than the GPU to run them, launches one graph for all of them.

Shapes: `B` images, `L` text tokens, `c` latent channels.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor

from ecdit.diffusion.patch import unpatchify
from ecdit.diffusion.solver import euler, guide, heun
from ecdit.model.dit import EcDit
from ecdit.recipe_model import ModelRecipe
from parallel.device import to_device
from parallel.graph import Graphed, Lot

SOLVERS = {"euler": euler, "heun": heun}
Count = Callable[[float, Tensor], None]  # of (time, experts per token (layers, B, S) uint8)


class Denoiser:
    """Takes steps with one model, which this process has whole or a part of."""

    def __init__(self, model: EcDit, recipe: ModelRecipe):
        """recipe: the model's."""
        self._model, self._recipe = model, recipe
        self._device = next(model.parameters()).device
        self._wide = torch.promote_types(next(model.parameters()).dtype, torch.float32)  # of latents and velocities
        self._solver, self._count = "euler", None
        self._graphed = Graphed(self._step) if self._can_be_captured() else None
        self._stream = torch.cuda.Stream(self._device) if self._graphed else None

    def _can_be_captured(self) -> bool:
        """megatron-core's layer decides shapes by its routing; ranks that share a model wait for each other."""
        alone = self._model.spread.alone
        return self._device.type == "cuda" and alone and self._recipe.routing != "megatron_topk"

    def __call__(
        self,
        latents: Tensor,
        interval: tuple[float, float],
        text: Tensor,
        text_mask: Tensor,
        *,
        solver: str,
        guidance: float,
        count: Count | None = None,
    ) -> Tensor:
        """latents (B, c, h, w) at the interval's first time -> those at its second. text (2B, L, Y) and text_mask
        (2B, L): for each image its caption's and the empty one's. `count` is called whenever the velocity was asked
        for."""
        numbers = to_device(torch.tensor([*interval, guidance], dtype=torch.float64), self._device)
        lot = latents.to(self._wide), text, text_mask
        self._solver, self._count = solver, count
        if self._graphed is None or count is not None:  # a count goes to the host at every step
            return self._step(numbers, [lot])
        with self._beside():
            return self._graphed((solver, latents.shape, text.shape), numbers, [lot]).clone()

    def _step(self, numbers: Tensor, lots: Iterable[Lot]) -> Tensor:
        """numbers (3,): the interval's times and the guidance, fp64; one lot: latents, text and its mask."""
        (latents, text, mask), model = next(iter(lots)), self._recipe

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            pairs = x.repeat_interleave(2, dim=0)
            out = self._model.infer(pairs, t.to(x).expand(len(pairs)), text, mask, model.sample_group_tokens)
            if self._count is not None:
                counts = [plan.experts_per_token().view(-1, 2, model.tokens)[:, 0] for plan in out.plans]
                self._count(t.item(), torch.stack(counts).to("cpu", torch.uint8))
            with_text, without = out.velocity.to(x).view(-1, 2, *out.velocity.shape[1:]).unbind(1)
            return unpatchify(guide(with_text, without, numbers[2].to(x)), model.patch, model.channels)

        return SOLVERS[self._solver](velocity, latents, numbers[:2])

    @contextmanager
    def _beside(self):
        """On the stream of the graph, in turn with the caller's."""
        callers = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield
        callers.wait_stream(self._stream)
