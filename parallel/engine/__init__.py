"""Engines: what turns a model and its gradients into updates, behind one interface that the training loop uses."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class UpdateSettings:
    """Plain values of the update: the optimizer's form, decay, largest global gradient norm, decay of the average."""

    name: str
    weight_decay: float
    clip: float
    ema: float


@dataclass(frozen=True)
class Update:
    """What one update did. `applied` is False where a gradient was not finite and nothing was changed."""

    grad_norm: float
    applied: bool


class Engine(Protocol):
    """One way to train a model over ranks. A step is `accumulate`, then `update`."""

    model: nn.Module

    def accumulate(self, micro_batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> Tensor:
        """Backward through `loss(model, micro_batch)` of each; returns the mean over all ranks of their sum (fp32)."""

    def update(self, lr: float) -> Update:
        """Reduces the gradients over ranks, clips, and updates weights and their average."""

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The model with its averaged weights, within the context."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that an update depends on: kind (weights, ema, square, ...) -> parameter name -> whole tensor."""

    def load(self, state: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Restores `state` as it was after that many updates."""
