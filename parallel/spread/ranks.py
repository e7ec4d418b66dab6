"""A model spread over the groups of a topology. See `Spread` for what each method means.

Shapes: as in `Spread`.
"""

from collections.abc import Callable

import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from torch import Tensor, nn

from parallel.copy_engines import engines_of
from parallel.dispatch import Exchange
from parallel.layers import PlainLinears
from parallel.layers.megatron import MegatronLinears
from parallel.parameters import Split
from parallel.precision import Fp8
from parallel.spread import ExpertFfn, LocalExchange, Spread
from parallel.topology import Topology
from parallel.transport import Collective, Transport


class RankSpread(Spread):
    """One rank's part of a model.

    `linears`: "torch" (megatron-core's where they are split) or "transformer_engine". `dispatch_chunks`: parts in
    which tokens travel to their experts, and `dispatch_fp8`: whether as FP8. `fp8`: what computes in it, which makes
    those parts Transformer Engine's. `recomputed`: whether blocks are, in the backward pass. `told`: what the user may
    want to know of this machine, or None.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        linears: str = "torch",
        dispatch_chunks: int = 1,
        dispatch_fp8: bool = False,
        fp8: Fp8 | None = None,
        recomputed: bool = False,
    ):
        self.fp8, self.dispatch_fp8 = fp8 or Fp8(), dispatch_fp8
        self._topology, self._chunks = topology, dispatch_chunks
        self._groups, self._tensor = topology.groups, topology.groups.tp
        self.tensor_ranks, self.tensor_rank = self._tensor.size(), self._tensor.rank()
        shared = self._tensor, self._groups.pp, self._groups.ep, self._groups.expt_tp
        self.alone = all(group.size() == 1 for group in shared)
        self.sequence = topology.layout.sequence and self.tensor_ranks > 1
        self.first_stage, self.last_stage = topology.first_stage, topology.last_stage
        self._transport: Callable[[int], Transport] | None = None  # made where there is an exchange
        self.told: str | None = None
        if linears == "transformer_engine" or "linears" in self.fp8.where:
            from parallel.layers.transformer_engine import TransformerEngineLinears  # needs the extra, and a GPU

            self.linears = TransformerEngineLinears(self._tensor, self.sequence, self.fp8, not recomputed)
        elif self.tensor_ranks > 1:
            self.linears = MegatronLinears(self._tensor, self.sequence)
        else:
            self.linears = PlainLinears()

    def layers(self, count: int) -> range:
        stage, stages = self._groups.pp.rank(), self._groups.pp.size()
        return range(stage * count // stages, (stage + 1) * count // stages)

    def expert_splits(self, hidden_dim: int) -> tuple[Split, ...]:
        ep, etp = self._groups.ep, self._groups.expt_tp
        return Split(0, ep.rank(), ep.size()), Split(hidden_dim, etp.rank(), etp.size())

    def exchange(self, experts: int) -> LocalExchange | Exchange:
        if self._groups.ep.size() == self._groups.expt_tp.size() == 1:
            return LocalExchange(experts)
        if self._transport is None:
            self._transport, self.told = self._carry()
        return Exchange(self._groups, experts, self._chunks, self._transport)

    def _carry(self) -> tuple[Callable[[int], Transport], str | None]:
        """What makes the transport of a box, one for all layers; what to tell of it."""
        group = self._groups.ep
        engines, why = engines_of(group, 2 * self._chunks, self._topology.device)
        if engines is not None:
            return engines.box, None
        told = f"Tokens go to their experts by NCCL and not by the GPUs' copy engines: {why}" if why else None
        return (lambda _box: Collective(group)), told

    def expert_ffns(self, experts: int, width: int, plain: ExpertFfn) -> nn.ModuleList | None:
        if "experts" not in self.fp8.where:
            return None
        from parallel.layers.grouped_ffn import GroupedFfn  # needs the extra, and a GPU

        ep, parts = self._groups.ep, self._groups.expt_tp.size()
        count = experts // ep.size() // self._chunks
        firsts = [ep.rank() * experts // ep.size() + chunk * count for chunk in range(self._chunks)]
        hidden = 4 * width // parts
        # parts of an expert have one scale in a checkpoint, so maxima are then taken over all ranks
        same = self._groups.expt_dp if parts == 1 else None
        return nn.ModuleList(
            GroupedFfn(self.fp8, width, hidden, plain, first, count, experts, same) for first in firsts
        )

    def dense_ffn(self, width: int, plain: ExpertFfn) -> nn.Module | None:
        if "linears" not in self.fp8.where or self.tensor_ranks > 1:
            return None
        from parallel.layers.grouped_ffn import GroupedFfn  # needs the extra, and a GPU

        return GroupedFfn(self.fp8, width, 4 * width, plain, 0, 1, 1)

    def megatron_moe(self, width: int, experts: int, aux_loss: float) -> nn.Module:
        from parallel.megatron_moe import MegatronMoe  # needs the extra `te`, and a GPU

        return MegatronMoe(self._topology, width, experts, aux_loss)

    def receive(self, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        if self.first_stage:
            return None
        hidden = like.new_empty(shape)
        dist.recv(hidden, group=self._groups.pp, group_src=self._groups.pp.rank() - 1)
        return hidden

    def send(self, hidden: Tensor | None) -> None:
        if not self.last_stage:
            dist.send(hidden, group=self._groups.pp, group_dst=self._groups.pp.rank() + 1)

    def share(self, result: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
        result = result.contiguous() if self.last_stage else like.new_empty(shape)
        if self._groups.pp.size() > 1:
            dist.broadcast(result, group=self._groups.pp, group_src=self._groups.pp.size() - 1)
        return result

    def own(self, x: Tensor) -> Tensor:
        return x.chunk(self.tensor_ranks)[self.tensor_rank] if self.sequence else x

    def conditioning(self, x: Tensor) -> Tensor:
        if self.sequence:
            return mappings.gather_from_sequence_parallel_region(x, group=self._tensor)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self._tensor)

    def features(self, x: Tensor) -> Tensor:
        if self.sequence:
            return mappings.all_to_all_hp2sp(x, group=self._tensor)
        return mappings.gather_from_tensor_model_parallel_region(x, group=self._tensor)

    def collect(self, x: Tensor) -> Tensor:
        return self._gather(x) if self.sequence else x

    def own_tokens(self, x: Tensor) -> Tensor:
        return x if self.sequence else mappings.scatter_to_sequence_parallel_region(x, group=self._tensor)

    def collect_tokens(self, x: Tensor) -> Tensor:
        return x if self.sequence else self._gather(x)

    def gather_scores(self, scores: Tensor) -> Tensor:
        return mappings.gather_from_sequence_parallel_region(scores, group=self._tensor)

    def mean_over_tokens(self, value: Tensor) -> Tensor:
        return mappings.reduce_from_tensor_model_parallel_region(value / self.tensor_ranks, group=self._tensor)

    def _gather(self, x: Tensor) -> Tensor:
        # what follows is the same on every rank, so each takes its part of the gradient and nothing is summed
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self._tensor)
