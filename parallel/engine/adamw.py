"""Adam with decoupled weight decay (Loshchilov and Hutter 2019), over flat slices of the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parallel.engine.ema import Ema
from parallel.engine.optimizer import KINDS, Slice, States, weights_of

BETAS, EPSILON = (0.9, 0.999), 1e-8
# (groups of weights as torch's optimizers have them) -> an optimizer with torch's interface and states
Kernels = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def torch_kernels(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's own."""
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, fused=True)


class AdamW:
    """Every element for itself, so units do not matter. Its states go by the names of the other optimizers':
    "square" is Adam's second moment, "momentum" its first."""

    def __init__(
        self,
        slices: list[Slice],
        *,
        weight_decay: float = 0.0,
        states: States | None = None,
        kernels: Kernels = torch_kernels,
    ):
        """`states`: as for `RmspropMomentum`. `kernels`: whose the arithmetic is."""
        self._masters, self._weights = [piece.master for piece in slices], weights_of(slices)
        self.states = states or {kind: [torch.zeros_like(master) for master in self._masters] for kind in KINDS}
        groups = [
            {"params": [s.master for s in slices if s.decay], "weight_decay": weight_decay},
            {"params": [s.master for s in slices if not s.decay], "weight_decay": 0.0},
        ]
        self._optimizer = kernels([group for group in groups if group["params"]])
        for master, square, momentum in zip(self._masters, *(self.states[kind] for kind in KINDS), strict=True):
            self._optimizer.state[master] = {
                "step": torch.zeros((), device=master.device) if kernels is torch_kernels else 0,
                "exp_avg": momentum,
                "exp_avg_sq": square,
            }
        self.updates = torch.zeros(())

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
        for state in self._optimizer.state.values():
            step = state["step"]
            state["step"] = step.fill_(float(self.updates)) if isinstance(step, Tensor) else int(self.updates)
        for group in self._optimizer.param_groups:
            group["lr"] = float(lr)
        self._optimizer.step()
        self.updates += 1
        self._optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update(self._masters)
        if self._weights is not None:
            torch._foreach_copy_(self._weights, self._masters)
