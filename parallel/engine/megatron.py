"""The megatron-core engine: its DDP and flat gradient buffers, its pipeline schedule, our optimizer and EMA sharded
over the buffers.

Each data rank reduces the gradients of an equal slice of every bucket, while the backward pass of the last micro-batch
is still running, keeps the fp32 master weights, optimizer states and weight average of that slice alone, updates it,
and gathers the others' (ZeRO-1). megatron-core's own DistributedOptimizer admits only Adam.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from parallel.apex import accumulate_in_products
from parallel.checkpoint.boxes import Boxes
from parallel.engine import Loss, Update, UpdateSettings
from parallel.engine.adamw import AdamW
from parallel.engine.ema import Ema
from parallel.engine.optimizer import RmspropMomentum, Slice, TorchRmsprop, clip_scale
from parallel.engine.pipeline import Pipeline
from parallel.engine.sharding import Buckets, Catalogue
from parallel.kernels.rmsprop import squared_norms
from parallel.parameters import named_parameters
from parallel.precision import fp8_states
from parallel.topology import Topology


class MegatronEngine:
    """See `parallel.engine.Engine`. Takes the model as it shall compute (bf16 or fp32); masters are fp32."""

    def __init__(self, model: nn.Module, topology: Topology, settings: UpdateSettings):
        self.topology, self.settings = topology, settings
        groups, tensor_ranks = topology.groups, topology.layout.tensor
        names = {parameter: name for name, parameter in named_parameters(model)}
        for parameter in names:
            # megatron-core reduces these over expert-data ranks instead of data ranks
            parameter.allreduce = not parameter.expert
        # a transformer's configuration is asked for; only what is said here is read. Under tensor parallelism gradients
        # of some weights are to be summed over its ranks: `Spread.mark_gradients` says which. A loss is a share of the
        # whole batch's, so gradients are summed over data ranks, too; DDP knows that as a loss per token.
        config = TransformerConfig(
            num_layers=topology.layout.pipeline,
            hidden_size=tensor_ranks,
            num_attention_heads=tensor_ranks,
            tensor_model_parallel_size=tensor_ranks,
            sequence_parallel=tensor_ranks > 1,
            calculate_per_token_loss=True,
        )
        self._ddp = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=topology.ranks > 1,
            ),
            model,
            pg_collection=groups,
        )
        # DDP has made the sums by now
        self.told = list(filter(None, [accumulate_in_products(model)]))
        self._pipeline = Pipeline(self._ddp, topology) if groups.pp.size() > 1 else None
        self._catalogue = Catalogue(names, topology)
        copy = groups.tp.rank() > 0
        self._buckets = [
            Buckets(self._ddp.buffers, names, groups.dp, copy),
            Buckets(self._ddp.expert_parallel_buffers, names, groups.expt_dp, copy),
        ]
        self._pieces = [piece for buckets in self._buckets for piece in buckets.pieces]
        self._gradients = [piece.gradients for piece in self._pieces]
        # masters are copies also in fp32, where the weights could serve: `averaged` overwrites the weights
        self._masters = [piece.weights.detach().float().clone() for piece in self._pieces]
        self._optimizer = self._make_optimizer()
        self._ema = Ema(self._masters, settings.ema)

    def _make_optimizer(self) -> RmspropMomentum | TorchRmsprop | AdamW:
        slices = [
            Slice(master, self._catalogue.number(piece), piece.decay, counted=not piece.copy, weights=piece.weights)
            for piece, master in zip(self._pieces, self._masters, strict=True)
        ]
        if self.settings.name == "torch_rmsprop":
            return TorchRmsprop(slices, weight_decay=self.settings.weight_decay)
        if self.settings.name == "adamw":
            return AdamW(slices, weight_decay=self.settings.weight_decay)
        return RmspropMomentum(
            slices,
            self._catalogue.unit_numels,
            weight_decay=self.settings.weight_decay,
            sum_over_ranks=self.topology.sum,
        )

    @property
    def model(self) -> nn.Module:
        """The model itself, without DDP."""
        return self._ddp.module

    def accumulate(self, micro_batches: Iterable[Any], count: int, loss: Loss, hidden_shape: tuple[int, ...]) -> Tensor:
        """Gradients add up in fp32 buffers; they are reduced from the last micro-batch's backward pass on."""
        self._ddp.zero_grad_buffer()
        run = self._pipeline.run if self._pipeline is not None else self._run
        total = run(micro_batches, count, loss, hidden_shape)
        finalize_model_grads([self._ddp], pg_collection=self.topology.groups)
        # every tensor rank has the loss of its data rank
        return self.topology.sum(total / self.topology.layout.tensor)

    def _run(self, micro_batches: Iterable[Any], count: int, loss: Loss, _hidden_shape: tuple[int, ...]) -> Tensor:
        total = torch.zeros((), device=self.topology.device)
        batches = iter(micro_batches)

        def step() -> None:
            value, part = loss(self._ddp, next(batches), None)
            value.backward()
            total.add_(part.detach())

        with self._ddp.no_sync():
            for _ in range(count - 1):
                step()
        step()
        return total

    def update(self, lr: float | Tensor, finite: Tensor | None = None) -> Update:
        """One update, unless a gradient or the loss is not finite: then nothing changes. The host does not wait for
        what is found on the device."""
        squares = squared_norms([p.gradients for p in self._pieces if not p.copy], self.topology.device)
        norm = self.topology.sum(squares.sum()).sqrt()
        applied = norm.isfinite() if finite is None else norm.isfinite() & finite
        self._optimizer.step(self._gradients, lr, self._ema, applied, clip_scale(norm, self.settings.clip))
        self._gather()
        return Update(norm, applied)

    @torch.no_grad()
    def _publish(self, values: list[Tensor]) -> None:
        """Writes the slices into the model's weights, on every rank."""
        torch._foreach_copy_([piece.weights for piece in self._pieces], values)
        self._gather()

    def _gather(self) -> None:
        """Sends every rank what the others have written into their slices of the model's weights."""
        for buckets in self._buckets:
            buckets.gather_weights()

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Puts the averaged weights in, and the trained ones back."""
        self._publish(self._ema.slices)
        try:
            yield self.model
        finally:
            self._publish(self._masters)

    def _kinds(self) -> dict[str, list[Tensor]]:
        return {"weights": self._masters, "ema": self._ema.slices, **self._optimizer.states}

    def state(self) -> dict[str, Boxes]:
        """What this rank keeps of everything that an update depends on, as views: saving reads them, loading writes."""
        of_slices = {
            f"{kind}/{name}": boxes
            for kind, values in self._kinds().items()
            for name, boxes in self._catalogue.boxes(self._pieces, values).items()
        }
        return of_slices | fp8_states(self.model)

    def gradients(self) -> dict[str, Boxes]:
        """What this rank keeps of the gradients that `accumulate` left."""
        return self._catalogue.boxes(self._pieces, self._gradients)

    def loaded(self, updates: int) -> None:
        """To be called when `state` has been written into: the model gets the weights as they were after that many
        updates."""
        self._optimizer.updates.fill_(updates)
        self._ema.updates.fill_(updates)
        self._publish(self._masters)
