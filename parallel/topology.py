"""The ranks of a run and their process groups, made by megatron-core and handed around explicitly.

This version spreads data alone: every rank holds the whole model, its optimizer states are sharded over the ranks.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from parallel import cpu


@dataclass(frozen=True)
class Topology:
    """This rank's place. `groups` holds megatron-core's process groups, with its names (dp, expt_dp, ...)."""

    groups: ProcessGroupCollection
    device: torch.device

    @property
    def rank(self) -> int:
        """Of all ranks."""
        return dist.get_rank()

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

    def gather(self, items: list) -> list:
        """Every data rank's items, in the order of the ranks."""
        if self.data_ranks == 1:
            return items
        parts: list[list] = [[]] * self.data_ranks
        dist.all_gather_object(parts, items, group=self.groups.dp)
        return [item for part in parts for item in part]

    def agree(self, flag: bool) -> bool:
        """Whether any rank raised the flag: all ranks get the same answer."""
        raised = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of an fp32 tensor over the data ranks."""
        dist.all_reduce(values, group=self.groups.dp)
        return values / self.data_ranks


def start(timeout_minutes: float) -> Topology:
    """Joins the job that torchrun or the like has set up (RANK, WORLD_SIZE, ...), or makes one of a single rank.

    NCCL where CUDA is present, gloo otherwise. All groups get the one time-out. Done once in a process.
    """
    cuda = torch.cuda.is_available()
    cpu.prepare()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend, timeout = ("nccl" if cuda else "gloo"), timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            expert_tensor_parallel_size=1, distributed_timeout_minutes=timeout_minutes
        )
    return Topology(ProcessGroupCollection.use_mpu_process_groups(), device)


def stop() -> None:
    """Leaves the job: destroys the groups, so that a process may start again or end quietly."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
