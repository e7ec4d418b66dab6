"""Where DeepSpeed keeps what of the weights: the flat fp32 tensors that it updates on this rank, for each ZeRO stage.

| stage | weights | gradients | masters and states | a flat is |
|---|---|---|---|---|
| 0 | every rank | every rank | every rank | a weight |
| 1 | every rank | every rank | a rank's part | its part of a group of weights, one after the other |
| 2 | every rank | a rank's part | a rank's part | the same |
| 3 | a rank's part | a rank's part | a rank's part | its parts of each weight of a group, one after the other |

A *group* is what the optimizer is given as one, of weights that are reduced over the same ranks. Under offload flats
are in the host's memory; on a disk (NVMe) they are in memory only within `Flats.held`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass
class Flat:
    """One of them. parts: (weight, first element of the rank's block of it, place in the flat, elements). copy: whether
    a rank that shares the gradients has the same."""

    master: Tensor
    parts: list[tuple[nn.Parameter, int, int, int]]
    copy: bool = False


class Flats(Protocol):
    """All of this rank, in the order in which they are updated."""

    flats: list[Flat]

    def gradients(self, number: int) -> list[Tensor]:
        """Of a flat, after the last backward pass: tensors that fill it from its beginning."""

    def publish(self) -> None:
        """Writes the masters into the model's weights, on every rank."""

    def on_disk(self, number: int) -> bool:
        """Whether a flat and its states are there."""

    def held(self, number: int) -> AbstractContextManager[None]:
        """Within it, a flat and its states are in memory, and what is written to them stays."""


def flats_of(optimizer: Any, stage: int, numels: dict[nn.Parameter, int], copies: set[nn.Parameter]) -> Flats:
    """Those of DeepSpeed's optimizer. numels: of this rank's block of every weight. copies: weights that a rank before
    this one, of those that share the gradients, has as well."""
    if stage == 0:
        return WholeWeights(optimizer, copies)
    if stage == 3:
        return PartsOfWeights(optimizer, numels)
    return PartsOfGroups(optimizer, numels)


class WholeWeights:
    """Stage 0, in fp32: the weights themselves."""

    def __init__(self, optimizer: torch.optim.Optimizer, copies: set[nn.Parameter]):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.flats = [Flat(weight, [(weight, 0, 0, weight.numel())], weight in copies) for weight in weights]

    def gradients(self, number: int) -> list[Tensor]:
        return [self.flats[number].master.grad]

    def publish(self) -> None:
        """They are the model's."""

    def on_disk(self, number: int) -> bool:
        return False

    def held(self, number: int) -> AbstractContextManager[None]:
        return nullcontext()


class PartsOfGroups:
    """Stages 1 and 2: equal parts of a group's weights, which lie one after the other.

    DeepSpeed has two classes for it, of which the one for bf16 at stage 1 keeps its gradients in a flat of its own.
    """

    def __init__(self, optimizer: Any, numels: dict[nn.Parameter, int]):
        self._optimizer = optimizer
        self._whole_gradients = not hasattr(optimizer, "single_partition_of_fp32_groups")
        if self._whole_gradients:
            weights, masters = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        else:
            weights, masters = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        groups = optimizer.real_dp_process_group
        self.flats = [
            Flat(master, list(_overlap(of_group, numels, dist.get_rank(group) * len(master), len(master))))
            for of_group, master, group in zip(weights, masters, groups, strict=True)
        ]

    def gradients(self, number: int) -> list[Tensor]:
        if self._whole_gradients:
            return [self._optimizer.fp32_groups_gradient_flat_partition[number]]
        if self._optimizer.cpu_offload:
            self._optimizer._wait_for_offload_copies()
            return [self.flats[number].master.grad]
        return list(self._optimizer.averaged_gradients[number])

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def on_disk(self, number: int) -> bool:
        return False

    def held(self, number: int) -> AbstractContextManager[None]:
        return nullcontext()


def _overlap(
    weights: list[nn.Parameter], numels: dict[nn.Parameter, int], first: int, count: int
) -> Iterator[tuple[nn.Parameter, int, int, int]]:
    """What elements first ... first + count - 1 of weights one after the other are."""
    begin = 0
    for weight in weights:
        low, high = max(begin, first), min(begin + numels[weight], first + count)
        if low < high:
            yield weight, low - begin, low - first, high - low
        begin += numels[weight]


class PartsOfWeights:
    """Stage 3: an equal part of each weight, one after the other."""

    def __init__(self, optimizer: Any, numels: dict[nn.Parameter, int]):
        self._optimizer = optimizer
        self.flats = []
        self._gradients = []
        start = 0
        for weights, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            parts, place = [], 0
            for weight in weights:
                size = weight.partition_numel()
                first = optimizer._get_param_partition_rank(weight) * size
                count = min(size, numels[weight] - first)
                if count > 0:
                    parts.append((weight, first, place, count))
                place += size
            self.flats.append(Flat(master, parts))
            self._gradients.append(optimizer.grad_partitions_flat_buffer[start : start + place])
            start += place

    def gradients(self, number: int) -> list[Tensor]:
        return [self._gradients[number]]

    def publish(self) -> None:
        optimizer = self._optimizer
        for number in range(len(self.flats)):
            with self.held(number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if optimizer.persistent_parameters:  # small ones, which every rank has whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def on_disk(self, number: int) -> bool:
        return self._optimizer._swappable_optimizer_subgroup(number)

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        if not self.on_disk(number):
            yield
            return
        self._optimizer._optimizer_states_and_gradient_swap_in(number)
        yield
        self._optimizer._optimizer_states_and_gradient_swap_out(number)
