"""What a device computes of a training step, from a batch's latents and texts to new weights.

The host launches it and does not wait: what it wants to know comes later (`Launched.result`), so that it can prepare
and launch the next step meanwhile. With `train.graph` the whole of it is one CUDA graph.

Shapes: `b` images of a micro-batch; a rank's images of a step are `count` micro-batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecdit.diffusion.draws import Draws
from ecdit.diffusion.masking import keep_count, ratio_at
from ecdit.diffusion.objective import MicroBatch, objective, to_differentiate
from ecdit.errors import UserError
from ecdit.recipe import Recipe
from ecdit.statistics import RoutingStatistics
from parallel.device import Readable, to_device
from parallel.engine import Engine
from parallel.graph import Graphed, GraphError, Lot
from parallel.topology import Topology


@dataclass(frozen=True)
class Result:
    """Of one step over all ranks: mean velocity loss, gradient norm, whether weights changed, whether a rank is told to
    stop, most bytes that a rank has had, and routing statistics (`RoutingStatistics.record`) where they were counted.
    """

    loss: float
    grad_norm: float
    applied: bool
    stop: bool
    memory: int
    routing: dict[str, list[float]]


class Launched:
    """A step that a device may still be computing."""

    def __init__(self, found: Tensor, logged: bool, **about: Any):
        """`about`: what the host wants to remember of it."""
        self._numbers, self.logged, self.about = Readable(found), logged, about

    def result(self) -> Result:
        """Waits for it."""
        norm, applied, loss, *sums, stop, memory = self._numbers.tolist()
        routing = {}
        if self.logged:
            routing = RoutingStatistics.record(torch.tensor(sums, dtype=torch.float64).view(-1, 4))
        return Result(loss, norm, bool(applied), bool(stop), int(memory), routing)


class Step:
    """Launches steps of one run on this rank."""

    def __init__(self, recipe: Recipe, engine: Engine, place: Topology):
        self._recipe, self._engine, self._place = recipe, engine, place
        model = recipe.model
        routed = [layer for layer in range(model.layers) if model.sparse(layer) and model.grouped]
        self._routed = routed, [layer for layer in routed if str(layer) in engine.model.blocks]
        self._tokens = 0
        self._count_routing = True
        self._graphed = Graphed(self._compute) if recipe.train.graph else None

    def __call__(
        self, step: int, micro_batches: Iterable[MicroBatch], lr: float, *, stop: bool, logged: bool, **about: Any
    ) -> Launched:
        """Launches step number `step`, counted from 0. stop: whether this rank was told to stop. `logged`: whether
        routing is counted. Raises UserError where a graph is asked for and cannot be had."""
        self._tokens = keep_count(self._recipe.model.tokens, ratio_at(self._recipe.masking.schedule, step))
        device, lots = self._place.device, (tensors_of(micro) for micro in micro_batches)
        numbers = to_device(torch.tensor([lr], dtype=torch.float64), device)
        self._count_routing = logged or self._graphed is not None  # a graph does the same at every step
        if self._graphed is None:
            found = self._compute(numbers, lots)
        else:
            try:
                found = self._graphed(self._tokens, numbers, lots)
            except GraphError as error:
                raise UserError(f"train.graph: this step cannot be a CUDA graph ({error}); set it to false") from None
        self._engine.model.spread.fp8.weights_changed()
        # gradient norm and decision are everyone's; the rest are this rank's parts
        found = torch.cat([found[:2], self._place.sum(found[2:].clone())])
        told = to_device(torch.tensor([float(stop), self._place.memory()], dtype=torch.float64), device)
        return Launched(torch.cat([found, self._place.max(told)]), logged, lr=lr, **about)

    def _compute(self, numbers: Tensor, lots: Iterable[Lot]) -> Tensor:
        """numbers: the learning rate (1,) -> gradient norm, whether weights changed, this rank's part of the mean
        velocity loss, its sums of routing; fp64."""
        recipe, place = self._recipe, self._place
        routing = RoutingStatistics(*self._routed, place.device)
        velocity = torch.zeros((), device=place.device)

        def loss(model: nn.Module, lot: Lot, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
            micro = micro_batch_of(lot)
            per_image, extra, out = objective(model, micro, recipe, hidden)
            if self._count_routing:
                routing.add(out.plans)
            if per_image is not None:
                velocity.add_(per_image.detach().sum() / recipe.train.batch)
            return to_differentiate(per_image, extra, out, len(micro.latents), recipe.train.batch)

        size = recipe.train.micro_batch
        shape = self._engine.model.hidden_shape(size, self._tokens)
        count = recipe.train.batch // place.data_ranks // size
        total = self._engine.accumulate(iter(lots), count, loss, shape)
        update = self._engine.update(numbers[0], total.isfinite())
        # every tensor rank has its data rank's loss, on the last stage
        mean = velocity / place.layout.tensor
        told = torch.stack([update.grad_norm.double(), update.applied.double(), mean.double()])
        return torch.cat([told, routing.sums().double().flatten()])


def tensors_of(micro: MicroBatch) -> Lot:
    """A micro-batch as plain tensors; `keep` is left out where nothing is masked."""
    draws = micro.draws
    keep = () if draws.keep is None else (draws.keep,)
    return micro.latents, micro.text, micro.text_mask, draws.noise, draws.t, *keep


def micro_batch_of(lot: Lot) -> MicroBatch:
    """The reverse of `tensors_of`."""
    latents, text, mask, noise, t, *keep = lot
    return MicroBatch(latents, text, mask, Draws(noise, t, keep[0] if keep else None))
