"""The optimizer that DeepSpeed is a shell for: it hands over flat parts of the weights, and this updates them.

DeepSpeed hands over one flat at a time, or all: what it keeps of a group of weights, or of a part of one, on this rank.
Pieces of units lie in it, and padding. The update is the one that engine megatron makes: the same classes do it, over
views of the flats, so a unit is clipped as a whole wherever its pieces are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.engine import UpdateSettings
from parallel.engine.adamw import AdamW
from parallel.engine.deepspeed_adam import kernels_for
from parallel.engine.ema import Ema
from parallel.engine.optimizer import KINDS, RmspropMomentum, Slice, TorchRmsprop
from parallel.engine.sharding import Span

AVERAGE = "average"  # the weights' average, beside the optimizer's states in torch's `Optimizer.state`
STATES = (*KINDS, AVERAGE)


class FlatSpan(Span):
    """A span that lies in a flat: `place` is where it begins there, `count` its elements. `number` is its unit's;
    `counted`, `decay`: as in `Slice`."""

    def __init__(self, span: Span, place: int, count: int, number: int, *, decay: bool, counted: bool):
        super().__init__(span.parameter, span.unit, span.start)
        self.place, self.count, self.number = place, count, number
        self.decay, self.counted = decay, counted

    def of(self, flat: Tensor) -> Tensor:
        """Its elements, a view."""
        return flat[self.place : self.place + self.count]


class ClientOptimizer(torch.optim.Optimizer):
    """Made for the model's weights, which DeepSpeed replaces by its flats; `spans` says then what lies in each."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        settings: UpdateSettings,
        unit_numels: list[int],
        sum_over_ranks: Callable[[Tensor], Tensor],
    ):
        """groups: of weights, as torch's optimizers have them. unit_numels, sum_over_ranks: as in `RmspropMomentum`."""
        super().__init__(groups, {"lr": 0.0})
        self._settings, self._unit_numels, self._sum = settings, unit_numels, sum_over_ranks
        self.spans: dict[Tensor, Sequence[FlatSpan]] = {}
        self.updates = 0
        self._lr, self._factor, self._applied = 0.0, 1.0, False
        # for the flats that are handed over together: where they and their states lay, and what updates them
        self._made: dict[tuple[int, ...], tuple[tuple[int, ...], Any, Ema]] = {}

    def begin(self, lr: float, factor: float, *, applied: bool) -> None:
        """Before a step's flats are handed over: the learning rate, what gradients are multiplied by, and whether
        anything shall change at all."""
        self._lr, self._factor, self._applied = lr, factor, applied

    def ended(self) -> None:
        """After a step's last flat."""
        self.updates += self._applied

    def prepare(self, flat: Tensor) -> None:
        """Makes the states of a flat, before its first step, so that a checkpoint can be loaded into them."""
        if not self.state[flat]:
            master = flat.detach().view(-1)
            self.state[flat] |= {kind: torch.zeros_like(master) for kind in KINDS} | {AVERAGE: master.clone()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates the flats that are in `param_groups` now, from their gradients."""
        if not self._applied:
            return
        flats = [flat for group in self.param_groups for flat in group["params"]]
        spans = [(flat, span) for flat in flats for span in self.spans[flat]]
        if not spans:  # padding alone
            if self._settings.name == "rmsprop_momentum":  # the other ranks sum over units
                self._sum(torch.zeros(len(self._unit_numels), device=flats[0].device))
            return
        gradients = [span.of(flat.grad.view(-1)) for flat, span in spans]
        optimizer, average = self._over(spans)
        optimizer.updates.fill_(self.updates)
        average.updates.fill_(self.updates)
        optimizer.step(gradients, self._lr, average, scale=self._factor)

    def _over(self, spans: list[tuple[Tensor, FlatSpan]]) -> tuple[Any, Ema]:
        """What updates them, kept as long as they lie where they lay: DeepSpeed moves what it keeps on a disk."""
        for flat, _ in spans:
            self.prepare(flat)
        flats = dict.fromkeys(flat for flat, _ in spans)
        key = tuple(id(flat) for flat in flats)
        places = tuple(t.data_ptr() for flat in flats for t in (flat, *self.states(flat).values()))
        if self._made.get(key, ((),))[0] != places:
            masters = [span.of(flat.detach().view(-1)) for flat, span in spans]
            slices = [
                Slice(master, span.number, span.decay, counted=span.counted)
                for master, (_, span) in zip(masters, spans, strict=True)
            ]
            states = {kind: [span.of(self.state[flat][kind]) for flat, span in spans] for kind in STATES}
            average = Ema(masters, self._settings.ema, states.pop(AVERAGE))
            self._made[key] = (places, self._make(slices, states), average)
        return self._made[key][1:]

    def states(self, flat: Tensor) -> dict[str, Tensor]:
        """Of a flat, by kind."""
        return {kind: self.state[flat][kind] for kind in STATES}

    def _make(self, slices: list[Slice], states: dict[str, list[Tensor]]) -> RmspropMomentum | TorchRmsprop | AdamW:
        name, decay = self._settings.name, self._settings.weight_decay
        if name == "torch_rmsprop":
            return TorchRmsprop(slices, weight_decay=decay, states=states)
        if name == "adamw":
            return AdamW(slices, weight_decay=decay, states=states, kernels=kernels_for(slices[0].master.device))
        return RmspropMomentum(slices, self._unit_numels, weight_decay=decay, sum_over_ranks=self._sum, states=states)
