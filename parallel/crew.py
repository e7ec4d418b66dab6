"""Ranks that share work which needs no model: who they are, and a point where they wait for each other."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")
LONGEST_WAIT = timedelta(days=7)  # a rank may have a part left that takes hours


class Crew:
    """This process's place among the ranks of a job that torchrun or srun started; alone where none did."""

    def __init__(self):
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.ranks > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)

    @property
    def first(self) -> bool:
        """Whether this is the rank that does what one does for all."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU where there is none."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def meet(self) -> None:
        """Returns when all ranks have called it."""
        if self.ranks > 1:
            dist.barrier()

    def once(self, work: Callable[[], Result]) -> Result:
        """Has the first rank do it while the others wait. What it returns or raises there, it does in every rank."""
        if self.ranks == 1:
            return work()
        told: list = [None, None]
        if self.first:
            try:
                told[0] = work()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def close(self) -> None:
        """Leaves the job."""
        if self.ranks > 1:
            dist.destroy_process_group()
