"""Engines: what turns a model and its gradients into updates, behind one interface that the training loop uses."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from parallel.checkpoint.boxes import Boxes


@dataclass(frozen=True)
class UpdateSettings:
    """Plain values of the update: the optimizer's form, decay, largest global gradient norm, decay of the average."""

    name: str
    weight_decay: float
    clip: float
    ema: float


@dataclass(frozen=True)
class Update:
    """What one update did, as scalars on the device. `applied` is False where a gradient or the loss was not finite and
    nothing was changed."""

    grad_norm: Tensor
    applied: Tensor


# (model, micro-batch, what the pipeline stage before sent, or None) -> what is to be differentiated, a scalar on the
# last stage, on the others what the next stage needs; and this stage's part of the loss. A micro-batch's loss is its
# share of the whole batch's, over all ranks: what flows back, and so FP8's scales of it, is then the same on any layout
Loss = Callable[[nn.Module, Any, Tensor | None], tuple[Tensor, Tensor]]


class Engine(Protocol):
    """One way to train a model over ranks. A step is `accumulate`, then `update`."""

    model: nn.Module
    told: list[str]  # what a user should know of how it computes here

    def accumulate(self, micro_batches: Iterable[Any], count: int, loss: Loss, hidden_shape: tuple[int, ...]) -> Tensor:
        """Backward through the loss of each of `count` micro-batches, and the gradients' sum over data ranks; returns
        the sum of the losses over data ranks, stages and micro-batches (fp32).

        `hidden_shape`: of what a pipeline stage sends the next, (images, tokens, width).
        """

    def update(self, lr: float | Tensor, finite: Tensor | None = None) -> Update:
        """Clips, and updates weights and their average. lr: a scalar, also one on the device. finite: whether the loss
        was; False: nothing changes."""

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """The model with its averaged weights, within the context."""

    def state(self) -> dict[str, Boxes]:
        """What this rank keeps of everything that an update depends on, as "kind/parameter" (kinds: weights, ema,
        square, ...): views that saving reads and loading writes into."""

    def loaded(self, updates: int) -> None:
        """To be called when `state` has been written into, with the number of updates that had been made."""
