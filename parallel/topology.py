"""The ranks of a run and their process groups, made by megatron-core and handed around explicitly.

Eight ranks as tensor 2, expert 4, pipeline 1 (ranks of a group joined):

| group | field | ranks | shares |
|---|---|---|---|
| tensor | tp | 01 23 45 67 | a layer's matrices, and the images of a micro-batch |
| data | dp | 0246 1357 | nothing: each rank has its slice of the global batch |
| expert | ep | 0123 4567 | the experts of a layer |
| expert-tensor | expt_tp | 0 1 2 3 4 5 6 7 | the matrices of one expert |
| expert-data | expt_dp | 04 15 26 37 | nothing: same experts, other tokens |
| pipeline | pp | 0 1 2 3 4 5 6 7 | the layers of the model |

With pipeline 2 (tensor 2, expert 2): tp and ep 01 23 45 67, dp and expt_dp 02 13 46 57, pp 04 15 26 37. With
expert-tensor 2 (tensor 2, expert 2, pipeline 1): ep 02 13 46 57, expt_tp 01 23 45 67, expt_dp 04 15 26 37.

Experts stand on a grid of their own (expert x expert-tensor x expert-data x pipeline = ranks), so that an expert group
may span tensor ranks: each of these has tokens of its own.
"""

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel import cpu, graph
from parallel.watchdog import record_collectives

_job: dict[str, dist.Store] = {}  # torch keeps the groups of a process, but not its store


class LayoutError(Exception):
    """The ranks of this job cannot be laid out as asked."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes, as `parallel.*` of a recipe has them."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    pipeline: int = 1
    sequence: bool = False

    def check(self, ranks: int) -> None:
        """Raises LayoutError where `ranks` do not divide, naming the key and the numbers of ranks that would do."""
        for keys, size in (
            ("parallel.tensor x parallel.pipeline", self.tensor * self.pipeline),
            (
                "parallel.expert x parallel.expert_tensor x parallel.pipeline",
                self.expert * self.expert_tensor * self.pipeline,
            ),
        ):
            if ranks % size:
                raise LayoutError(
                    f"{keys}: {size} does not divide the {ranks} ranks of this job; try {size} or a multiple"
                )


@dataclass(frozen=True)
class Topology:
    """This rank's place. `groups` holds megatron-core's process groups, with its names (dp, expt_dp, ...); `store` is
    the job's, where ranks leave word for each other."""

    groups: ProcessGroupCollection
    device: torch.device
    layout: Layout
    store: dist.Store

    @property
    def rank(self) -> int:
        """Of all ranks."""
        return dist.get_rank()

    @property
    def ranks(self) -> int:
        """All of them."""
        return dist.get_world_size()

    @property
    def data_rank(self) -> int:
        """Which contiguous slice of the global batch this rank has."""
        return self.groups.dp.rank()

    @property
    def data_ranks(self) -> int:
        """Slices of the global batch."""
        return self.groups.dp.size()

    @property
    def first(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether this rank is the one of its data rank that writes what all of that have."""
        return self.groups.tp.rank() == 0 and self.first_stage

    @property
    def first_stage(self) -> bool:
        """Whether this rank has the model's first layers."""
        return self.groups.pp.rank() == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank has the model's last layers, and so the loss."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def __str__(self) -> str:
        """For log files: this rank's place in every group."""
        names = ("dp", "tp", "pp", "ep", "expt_tp", "expt_dp")
        places = ", ".join(f"{n} {getattr(self.groups, n).rank()}/{getattr(self.groups, n).size()}" for n in names)
        return f"rank {self.rank} of {self.ranks} on {self.device}: {places}"

    def gather(self, items: list) -> list:
        """Every data rank's items, in the order of the ranks."""
        if self.data_ranks == 1:
            return items
        parts: list[list] = [[]] * self.data_ranks
        dist.all_gather_object(parts, items, group=self.groups.dp)
        return [item for part in parts for item in part]

    def shared(self, rows: int, compute: Callable[[slice], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """compute(all rows), each tensor rank doing its part of them where they divide. No gradients."""
        lots = self.layout.tensor
        if lots == 1 or rows % lots:
            return compute(slice(0, rows))
        size, rank = rows // lots, self.groups.tp.rank()
        parts = compute(slice(rank * size, (rank + 1) * size))
        found = []
        for part in parts:
            whole = part.new_empty(rows, *part.shape[1:])
            dist.all_gather_into_tensor(whole, part.contiguous(), group=self.groups.tp)
            found.append(whole)
        return tuple(found)

    def everyones(self, item: Any) -> list:
        """What each rank has, in the order of the ranks; returns once all have come here."""
        if self.ranks == 1:
            return [item]
        items = [None] * self.ranks
        dist.all_gather_object(items, item)
        return items

    def memory(self) -> int:
        """Bytes that this rank had at most so far, on its GPU, or of its process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Largest numbers of all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values


def start(layout: Layout, timeout_minutes: float) -> Topology:
    """Joins the job that torchrun, srun or the like has set up (see `parallel.job`), or makes one of a single rank.

    NCCL where CUDA is present, gloo otherwise. All groups get the one time-out. Done once in a process.
    Raises LayoutError where the ranks do not divide.
    """
    layout.check(int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1)
    cuda = torch.cuda.is_available()
    cpu.prepare()
    record_collectives()
    # a scheduler may show each rank its own GPU alone
    device = _gpu(int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            store, rank, ranks = next(dist.rendezvous("env://", timeout=timeout))
        else:
            store, rank, ranks = dist.HashStore(), 0, 1
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("groups", store),
            rank=rank,
            world_size=ranks,
            timeout=timeout,
        )
        _job["store"] = store
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=False,  # beside NCCL's: nobody uses them
            # no weight is shared by two stages, so nothing is to be summed over them
            get_embedding_ranks=lambda ranks, *_: ranks[:1],
        )
    return Topology(ProcessGroupCollection.use_mpu_process_groups(), device, layout, _job["store"])


def _gpu(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def stop() -> None:
    """Leaves the job: destroys the groups, so that a process may start again or end quietly."""
    graph.release_all()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
