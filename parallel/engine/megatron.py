"""The megatron-core engine: its DDP and flat gradient buffers, our optimizer and EMA sharded over them.

Each data rank reduces the gradients of an equal slice of every bucket, keeps the fp32 master weights, optimizer
states and weight average of that slice alone, updates it, and gathers the others' (ZeRO-1). megatron-core's own
DistributedOptimizer admits only Adam.
"""

from collections.abc import Callable, Iterable, Iterator
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

from parallel.engine import Update, UpdateSettings
from parallel.engine.ema import Ema
from parallel.engine.optimizer import RmspropMomentum, Slice, TorchRmsprop, clip_by_global_norm, squared_norms
from parallel.engine.sharding import Shard
from parallel.topology import Topology


class MegatronEngine:
    """See `parallel.engine.Engine`. Takes the model as it shall compute (bf16 or fp32); masters are fp32."""

    def __init__(self, model: nn.Module, topology: Topology, settings: UpdateSettings):
        self.topology, self.settings = topology, settings
        for parameter in model.parameters():
            # megatron-core reduces these over expert-data ranks instead of data ranks
            parameter.allreduce = not parameter.expert
        self._ddp = DistributedDataParallel(
            # DDP asks for a transformer's configuration but reads only flags of it that are off by default
            TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1),
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            model,
            pg_collection=topology.groups,
        )
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups = topology.groups
        shards = [
            Shard(self._ddp.buffers, names, groups.dp),
            Shard(self._ddp.expert_parallel_buffers, names, groups.expt_dp),
        ]
        self._parts = [_Part(shard, settings) for shard in shards if shard.shapes]

    @property
    def model(self) -> nn.Module:
        """The model itself, without DDP."""
        return self._ddp.module

    def accumulate(self, micro_batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> Tensor:
        """Backward through each micro-batch; gradients add up in fp32 buffers and are reduced in `update`."""
        self._ddp.zero_grad_buffer()
        total = torch.zeros((), device=self.topology.device)
        with self._ddp.no_sync():
            for micro_batch in micro_batches:
                value = loss(self._ddp, micro_batch)
                value.backward()
                total += value.detach().float()
        return self.topology.mean(total)

    def update(self, lr: float) -> Update:
        """One update, unless a gradient is not finite: then nothing changes."""
        finalize_model_grads([self._ddp], pg_collection=self.topology.groups)
        norm = torch.stack([part.shard.sum(squared_norms(part.gradients).sum()) for part in self._parts]).sum().sqrt()
        applied = bool(norm.isfinite())
        if applied:
            for part in self._parts:
                clip_by_global_norm(part.gradients, norm, self.settings.clip)
                part.step(lr)
        return Update(norm.item(), applied)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Puts the averaged weights in, and the trained ones back."""
        for part in self._parts:
            part.publish(part.ema.slices)
        try:
            yield self.model
        finally:
            for part in self._parts:
                part.publish(part.masters)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors in fp32; every rank has them, one need write them."""
        state: dict[str, dict[str, Tensor]] = {}
        for part in self._parts:
            for kind, values in part.kinds().items():
                state.setdefault(kind, {}).update(part.shard.whole(values))
        return state

    def load(self, state: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Restores `state`, whatever the number of ranks that it was made on."""
        for part in self._parts:
            for kind, values in part.kinds().items():
                part.shard.scatter(state[kind], values)
            part.optimizer.step_count = updates
            part.ema.updates = updates
            part.publish(part.masters)


class _Part:
    """Masters, optimizer and average of one shard (dense parameters, or experts)."""

    def __init__(self, shard: Shard, settings: UpdateSettings):
        self.shard = shard
        # masters are copies also in fp32, where the weights could serve: `averaged` overwrites the weights
        self.masters = [piece.weights.detach().float().clone() for piece in shard.pieces]
        self.gradients = [piece.gradients for piece in shard.pieces]
        slices = [
            Slice(master, piece.unit, piece.decay) for piece, master in zip(shard.pieces, self.masters, strict=True)
        ]
        if settings.name == "rmsprop_momentum":
            self.optimizer = RmspropMomentum(
                slices, shard.unit_numels, weight_decay=settings.weight_decay, sum_over_ranks=shard.sum
            )
        else:
            self.optimizer = TorchRmsprop(slices, weight_decay=settings.weight_decay)
        self.ema = Ema(self.masters, settings.ema)

    def step(self, lr: float) -> None:
        self.optimizer.step(self.gradients, lr)
        self.ema.update(self.masters)
        self.publish(self.masters)

    def publish(self, values: list[Tensor]) -> None:
        """Writes the slices into the model's weights, on every rank."""
        with torch.no_grad():
            torch._foreach_copy_([piece.weights for piece in self.shard.pieces], values)
            self.shard.gather_weights()

    def kinds(self) -> dict[str, list[Tensor]]:
        return {"weights": self.masters, "ema": self.ema.slices, **self.optimizer.states}
