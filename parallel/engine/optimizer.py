"""RMSProp with momentum, in both forms, over flat slices of the weights, all slices at once.

A *unit* is a tensor of the model, or one expert's matrix of an expert weight; a slice is the part of a unit that this
rank updates. All of a unit's slices, on whatever ranks, make the same update that one rank would.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.engine.ema import Ema
from parallel.kernels.rmsprop import TINY, Passes

KINDS = ("square", "momentum")
States = dict[str, list[Tensor]]  # of each kind, a tensor a slice


@dataclass
class Slice:
    """master: fp32, flat. unit: number of its unit, the same on all ranks. decay: whether weights decay.
    counted: False where another rank has the same slice and counts it in sums over ranks. weights: the model's, in its
    own type, which every update makes the master rounded; of all slices or of none."""

    master: Tensor
    unit: int
    decay: bool
    counted: bool = True
    weights: Tensor | None = None


class RmspropMomentum:
    """The form of AdaStar in the paper's authors' public code base, axlearn:

    v = EMA(g^2), bias-corrected; u = g / sqrt(v); u /= max(1, rms(u)) for each unit; m = EMA(u);
    p -= lr (m + weight_decay p).
    """

    def __init__(
        self,
        slices: list[Slice],
        unit_numels: list[int],
        *,
        weight_decay: float = 0.0,
        beta_square: float = 0.95,
        beta_momentum: float = 0.95,
        clip_update: float = 1.0,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda values: values,
        states: States | None = None,
    ):
        """`unit_numels`: the size of every whole unit, also of those that this rank has no slice of.
        `sum_over_ranks`: sums a vector with one number a unit over the ranks that share the units.
        `states`: where they are kept, shaped like the slices; None: made here."""
        self.weight_decay = weight_decay
        self.beta_square, self.clip_update = beta_square, clip_update
        masters = [piece.master for piece in slices]
        self._sum = sum_over_ranks
        device = masters[0].device
        self._units = torch.tensor([piece.unit for piece in slices], dtype=torch.int64, device=device)
        self._counted = torch.tensor([float(piece.counted) for piece in slices], device=device)
        self._numels = torch.tensor(unit_numels, dtype=torch.float32, device=device)
        self.states = states or {kind: [torch.zeros_like(master) for master in masters] for kind in KINDS}
        decays = [piece.decay for piece in slices]
        self._passes = Passes(*self.states.values(), masters, weights_of(slices), decays, beta_square, beta_momentum)
        self.updates = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def step(
        self,
        gradients: list[Tensor],
        lr: float | Tensor,
        average: Ema | None = None,
        applied: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> None:
        """One update from fp32 gradients shaped like the slices, times `scale`, which it may overwrite; `average` takes
        in the new weights. lr, applied, scale: scalars on the device; where `applied` is 0 nothing changes, whatever
        the gradients are. The host does not wait.
        """
        like = self.updates
        applied = torch.ones_like(like) if applied is None else applied.to(like)
        lr, scale = (x.to(like) if isinstance(x, Tensor) else torch.full_like(like, x) for x in (lr, scale))
        self.updates += applied
        correction = 1 - self.beta_square**self.updates
        share = torch.zeros_like(like) if average is None else average.next_share(applied)
        numbers = torch.stack([correction, lr, lr * self.weight_decay, share, applied, scale])
        factor = self._factors(self._passes.first(gradients, numbers))
        self._passes.second(gradients, factor, numbers, None if average is None else average.slices)

    def _factors(self, squares: Tensor) -> Tensor:
        """1 / max(1, rms / clip_update) of each slice's unit, from the sum of squares of each slice's updates (n,)."""
        totals = self._sum(torch.zeros_like(self._numels).index_add_(0, self._units, squares * self._counted))
        rms = (totals / self._numels).sqrt()
        return (1 / (rms / self.clip_update).clamp(min=1))[self._units]


class TorchRmsprop:
    """torch.optim.RMSprop with momentum 0.9 over the slices; every element for itself, so units do not matter.

    Here the learning rate enters the momentum, epsilon stands outside the root, and the momentum sums instead of
    averaging, so the same rate makes steps about ten times those of `RmspropMomentum`.
    """

    def __init__(self, slices: list[Slice], *, weight_decay: float = 0.0, states: States | None = None):
        """`states`: as for `RmspropMomentum`."""
        self._masters, self._weights = [piece.master for piece in slices], weights_of(slices)
        self.states = states or {kind: [torch.zeros_like(master) for master in self._masters] for kind in KINDS}
        groups = [
            {"params": [s.master for s in slices if s.decay], "weight_decay": weight_decay},
            {"params": [s.master for s in slices if not s.decay], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizer = torch.optim.RMSprop(groups, momentum=0.9, foreach=True)
        # there before the first step, so that a checkpoint can be loaded into them
        for master, square, momentum in zip(self._masters, *(self.states[kind] for kind in KINDS), strict=True):
            self._optimizer.state[master] = {
                "step": torch.zeros(()),
                "square_avg": square,
                "momentum_buffer": momentum,
            }
        self.updates = torch.zeros(())  # nothing of this form depends on it

    @torch.no_grad()
    def step(
        self,
        gradients: list[Tensor],
        lr: float | Tensor,
        average: Ema | None = None,
        applied: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> None:
        """One update from fp32 gradients shaped like the slices, scaled in place; `average` takes in the new weights.
        Where `applied` is 0 nothing changes. The host waits for a GPU."""
        if applied is not None and not applied:
            return
        torch._foreach_mul_(gradients, scale)
        for master, gradient in zip(self._masters, gradients, strict=True):
            master.grad = gradient
        for group in self._optimizer.param_groups:
            group["lr"] = float(lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update(self._masters)
        if self._weights is not None:
            torch._foreach_copy_(self._weights, self._masters)


def weights_of(slices: list[Slice]) -> list[Tensor] | None:
    """The model's, where the slices know them."""
    return None if slices[0].weights is None else [piece.weights for piece in slices]


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """What gradients of this global norm are multiplied by, so that it is at most `limit`."""
    return (limit / norm.clamp(min=TINY)).clamp(max=1.0)
