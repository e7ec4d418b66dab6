"""The DeepSpeed engine: ZeRO stages 0 to 3 with offload, around the optimizer that engine megatron has.

DeepSpeed reduces gradients, keeps and moves the parts, and says when which of them is updated. The gradients' norm is
found here: its own counts expert weights by a mean over ranks. What it saves is not used either: the state goes by
parameter, as in the other engine, so checkpoints of one are the other's.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint import CheckpointError
from parallel.checkpoint.boxes import Boxes
from parallel.checkpoint.lock import FolderLock
from parallel.engine import Loss, Update, UpdateSettings
from parallel.engine.client import AVERAGE, STATES, ClientOptimizer, FlatSpan
from parallel.engine.deepspeed_adam import whose
from parallel.engine.deepspeed_config import ConfigError, ZeroOptions, config_of
from parallel.engine.deepspeed_import import import_deepspeed
from parallel.engine.optimizer import clip_scale
from parallel.engine.sharding import Catalogue, Span, units_of
from parallel.engine.zero import Flat, flats_of
from parallel.kernels.rmsprop import squared_norms
from parallel.parameters import is_whole, named_parameters
from parallel.topology import Topology

EXPERTS = "experts"  # DeepSpeed's name for the group of ranks that have the same ones
EXCHANGED = 1 << 24  # elements that are in memory twice while weights and averages change places


class DeepSpeedEngine:
    """See `parallel.engine.Engine`. Takes the model as it shall compute (bf16 or fp32); masters are fp32."""

    def __init__(self, model: nn.Module, topology: Topology, settings: UpdateSettings, options: ZeroOptions):
        import_deepspeed()
        self.topology, self.settings, self.model = topology, settings, model
        self._disk = None if options.nvme is None else _own_part_of(options.nvme)
        weights = {weight: name for name, weight in named_parameters(model)}
        self._catalogue = Catalogue(weights, topology)
        # of a weight, before DeepSpeed takes its values away
        numels = {weight: weight.numel() for weight in weights}
        units = {weight: list(units_of(name, weight)) for weight, name in weights.items()}
        copy = topology.groups.tp.rank() > 0
        self._copies = {weight for weight in weights if copy and is_whole(weight) and not weight.expert}
        self._decays = {weight: weight.ndim > 1 for weight in weights}
        apart = _experts_reduced_apart(model, topology)
        self._sum_over_tensor_ranks(weights)
        self._client = ClientOptimizer(self._groups(weights, apart), settings, self._catalogue.unit_numels, self._sum)
        self._deepspeed = self._start(_WithLoss(model, _expert_groups(topology) if apart else None), options)
        self._flats = flats_of(self._deepspeed.optimizer, options.stage, numels, self._later(weights))
        for flat in self._flats.flats:
            self._client.spans[flat.master] = list(self._spans(flat, weights, units))
        for number, flat in enumerate(self._flats.flats):
            with self._flats.held(number):
                self._client.prepare(flat.master)
        self.told = self._tell(options)
        self._lent: list[dict[str, Tensor]] = []  # what `state` has returned views of, until the next update

    def _start(self, wrapped: "_WithLoss", options: ZeroOptions) -> Any:
        """DeepSpeed's engine, over the process groups that there are already. Raises ConfigError."""
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        device = self.topology.device
        if options.stage == 3 and device.index not in (None, int(os.environ.get("LOCAL_RANK", 0))):
            raise ConfigError("zero: 3 needs every rank to see all GPUs of its node; let the scheduler hide none")
        weights = list(self.model.parameters())
        largest = max(weight.numel() for weight in weights)
        config = config_of(options, weights[0].dtype, self.topology.data_ranks, largest)
        for module in self.model.modules():
            if getattr(module, "gathered_whole", False):
                set_z3_leaf_module(module, True)
        with redirect_stdout(StringIO()), _device_told(device):  # it tells of its memory there
            deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", dist_init_required=False)
            engine, *_ = deepspeed.initialize(
                model=wrapped, optimizer=self._client, config=config, mpu=_Mpu(self.topology), dist_init_required=False
            )
        return engine

    # ---------------------------------------------------------------------------------------------------- what is where

    def _groups(self, weights: dict[nn.Parameter, str], apart: bool) -> list[dict[str, Any]]:
        """Groups of weights that are alike: reduced over the same ranks, copied on tensor ranks or not, decaying."""
        groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
        for weight in weights:
            expert = apart and weight.expert
            if expert:
                weight.allreduce, weight.group_name = False, EXPERTS
            whole = is_whole(weight) and not weight.expert
            groups.setdefault((expert, whole, self._decays[weight]), []).append(weight)
        marks = {True: {"moe": True, "name": EXPERTS}, False: {}}
        return [{"params": members, **marks[expert]} for (expert, *_), members in sorted(groups.items())]

    def _spans(
        self, flat: Flat, weights: dict[nn.Parameter, str], units: dict[nn.Parameter, list]
    ) -> Iterator[FlatSpan]:
        for weight, first, place, count in flat.parts:
            for unit, low, high in units[weight]:
                low, high = max(low, first), min(high, first + count)
                if low < high:
                    span = Span(weights[weight], unit, low)
                    yield FlatSpan(
                        span,
                        place + low - first,
                        high - low,
                        self._catalogue.number(span),
                        decay=self._decays[weight],
                        counted=not flat.copy and weight not in self._copies,
                    )

    def _later(self, weights: Iterable[nn.Parameter]) -> set[nn.Parameter]:
        """Those that a rank before this one has the same block of, and the same gradient."""
        groups = self.topology.groups
        return {w for w in weights if (groups.expt_dp if w.expert else groups.dp).rank() > 0}

    def _sum_over_tensor_ranks(self, weights: Iterable[nn.Parameter]) -> None:
        """Gradients of which each tensor rank has its own tokens' part (`Spread.mark_gradients`) are summed as they
        come, before DeepSpeed takes them."""
        group = self.topology.groups.tp
        if group.size() == 1:
            return

        def summed(gradient: Tensor) -> Tensor:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=group)
            return gradient

        for weight in weights:
            if weight.sequence_parallel:
                weight.register_hook(summed)

    def _sum(self, values: Tensor) -> Tensor:
        """Over all ranks; values may be in the host's memory."""
        return self.topology.sum(values.to(self.topology.device)).to(values.device)

    def _tell(self, options: ZeroOptions) -> list[str]:
        elements = sum(span.count for flat in self._flats.flats for span in self._client.spans[flat.master])
        told = [f"DeepSpeed, ZeRO stage {options.stage}: this rank updates {elements:,} of the model's weights."]
        if self.settings.name == "adamw":
            told.append(f"Adam's arithmetic is {whose(self._flats.flats[0].master.device.type)}'s.")
        return told

    # ----------------------------------------------------------------------------------------------------------- a step

    def accumulate(self, micro_batches: Iterable[Any], count: int, loss: Loss, hidden_shape: tuple[int, ...]) -> Tensor:
        """Gradients are reduced with every micro-batch from stage 2 on, else with the last."""
        total = torch.zeros((), device=self.topology.device)
        batches = iter(micro_batches)
        for number in range(count):
            self._deepspeed.set_gradient_accumulation_boundary(number == count - 1)
            value, part = self._deepspeed(loss, next(batches))
            # it takes the mean over data ranks
            self._deepspeed.backward(value * self.topology.data_ranks, scale_wrt_gas=False)
            total.add_(part)
        return self.topology.sum(total / self.topology.layout.tensor)

    def update(self, lr: float | Tensor, finite: Tensor | None = None) -> Update:
        """One update, unless a gradient or the loss is not finite: then nothing changes. The host waits."""
        self._lent = []
        squares = torch.zeros((), device=self.topology.device)
        for number, flat in enumerate(self._flats.flats):
            if any(span.counted for span in self._client.spans[flat.master]):
                gradients = self._flats.gradients(number)
                squares += squared_norms(gradients, self.topology.device).sum().to(squares)
        norm = self.topology.sum(squares).sqrt()
        applied = norm.isfinite() if finite is None else norm.isfinite() & finite
        factor = clip_scale(norm, self.settings.clip)
        self._client.begin(float(lr), float(factor), applied=bool(applied))
        self._deepspeed.step()
        self._client.ended()
        return Update(norm, applied)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The averaged weights and the trained ones change places, and back."""
        self._exchange()
        try:
            yield self.model
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for number, flat in enumerate(self._flats.flats):
            with self._flats.held(number):
                master, average = flat.master.detach().view(-1), self._client.state[flat.master][AVERAGE]
                for one, other in zip(master.split(EXCHANGED), average.split(EXCHANGED), strict=True):
                    kept = one.clone()
                    one.copy_(other)
                    other.copy_(kept)
        self._flats.publish()

    # ------------------------------------------------------------------------------------------------------------ state

    def state(self) -> dict[str, Boxes]:
        """What this rank keeps of everything that an update depends on, as views: saving reads them, loading writes."""
        self._lent = [self._values(number) for number in range(len(self._flats.flats))]
        names = {AVERAGE: "ema"}
        return {
            f"{names.get(kind, kind)}/{name}": boxes
            for kind in ("weights", *STATES)
            for name, boxes in self._boxes([values[kind] for values in self._lent]).items()
        }

    def _values(self, number: int) -> dict[str, Tensor]:
        """A flat and its states; of what is on a disk, copies."""
        flat = self._flats.flats[number].master
        with self._flats.held(number):
            values = {"weights": flat.detach().view(-1), **self._client.states(flat)}
            return {kind: value.clone() for kind, value in values.items()} if self._flats.on_disk(number) else values

    def gradients(self) -> dict[str, Boxes]:
        """What this rank keeps of the gradients that `accumulate` left."""
        flats = range(len(self._flats.flats))
        return self._boxes([torch.cat([g.flatten() for g in self._flats.gradients(number)]) for number in flats])

    def _boxes(self, values: list[Tensor]) -> dict[str, Boxes]:
        spans = [
            (span, value)
            for flat, value in zip(self._flats.flats, values, strict=True)
            for span in self._client.spans[flat.master]
        ]
        return self._catalogue.boxes([span for span, _ in spans], [span.of(value) for span, value in spans])

    def loaded(self, updates: int) -> None:
        """To be called when `state` has been written into: the model gets the weights as they were after that many
        updates."""
        self._client.updates = updates
        for number, values in enumerate(self._lent):
            if self._flats.on_disk(number):
                flat = self._flats.flats[number].master
                with self._flats.held(number):
                    held = {"weights": flat.detach().view(-1), **self._client.states(flat)}
                    for kind, value in values.items():
                        held[kind].copy_(value)
        self._lent = []
        self._flats.publish()


def _own_part_of(disk: str) -> FolderLock:
    """Keeps other runs out of this rank's part of the folder: they would write over what is there. Raises
    ConfigError."""
    try:
        return FolderLock(Path(disk) / f"rank-{dist.get_rank()}.lock")
    except CheckpointError as error:
        raise ConfigError(f"nvme: {error}") from None
    except OSError as error:
        raise ConfigError(f"nvme: {disk} cannot be written ({error.strerror}); name a folder on a disk") from None


@contextmanager
def _device_told(device: torch.device) -> Iterator[None]:
    """DeepSpeed takes the GPU of the number LOCAL_RANK, which a scheduler may mean otherwise."""
    before = os.environ.setdefault("LOCAL_RANK", "0")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        os.environ["LOCAL_RANK"] = before


class _WithLoss(nn.Module):
    """What DeepSpeed wraps: from a micro-batch to its loss, so that it sees the tensor that is differentiated."""

    def __init__(self, model: nn.Module, experts: nn.Module | None):
        """experts: what tells DeepSpeed that there are some (`_expert_groups`)."""
        super().__init__()
        self.model, self.experts = model, experts

    def forward(self, loss: Loss, micro_batch: Any) -> tuple[Tensor, Tensor]:
        value, part = loss(self.model, micro_batch, None)
        return value, part.detach()


def _experts_reduced_apart(model: nn.Module, topology: Topology) -> bool:
    """Whether expert weights are on other ranks than a dense weight is."""
    same = topology.groups.expt_dp.size() == topology.data_ranks
    return not same and any(weight.expert for weight in model.parameters())


def _expert_groups(topology: Topology) -> nn.Module:
    """A module of DeepSpeed's kind for MoE layers, by which it knows that there are experts, and asks for groups."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class ExpertGroups(MoE):
        """No layer, and without weights."""

        def __init__(self):
            nn.Module.__init__(self)
            self.num_experts = topology.groups.ep.size()

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            groups._EXPERT_PARALLEL_GROUP[EXPERTS] = topology.groups.ep
            groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = topology.groups.expt_dp
            for ranks, group in (
                (groups._EXPERT_PARALLEL_GROUP_RANKS, topology.groups.ep),
                (groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, topology.groups.expt_dp),
            ):
                ranks[EXPERTS] = dist.get_process_group_ranks(group)

    return ExpertGroups()


class _Mpu:
    """The groups as DeepSpeed asks for them."""

    def __init__(self, topology: Topology):
        self._groups = topology.groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp

    def get_model_parallel_rank(self) -> int:
        return self._groups.tp.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tp.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.dp

    def get_data_parallel_rank(self) -> int:
        return self._groups.dp.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._groups.dp.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
