"""The moving average of the weights, over the same slices as the optimizer's."""

import torch
from torch import Tensor


class Ema:
    """Average of fp32 slices. The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that the
    first weights are soon forgotten."""

    def __init__(self, masters: list[Tensor], decay: float, slices: list[Tensor] | None = None):
        """`slices`: where the average is kept; None: made here, of the weights as they are."""
        self.slices = [master.clone() for master in masters] if slices is None else slices
        self.decay = decay
        self.updates = torch.zeros((), dtype=torch.float64, device=masters[0].device)

    def next_share(self, applied: Tensor | float = 1.0) -> Tensor:
        """How much of the weights goes into the average at the next update, which it counts where it is applied.
        fp64."""
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        self.updates += applied
        return 1 - decay

    def update(self, masters: list[Tensor]) -> None:
        """Takes in the weights of one more update. The host waits for a GPU."""
        torch._foreach_lerp_(self.slices, masters, self.next_share().item())
