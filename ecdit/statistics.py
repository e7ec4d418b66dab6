"""What is told of a step's routing: exact over the whole global batch, whatever the layout and the micro-batch."""

import torch
from torch import Tensor

from ecdit.model.router import RoutingPlan


class RoutingStatistics:
    """Share of tokens that no expert took, mean and spread of the experts per token, of each MoE layer in a step.

    Sums stay on the device until `record`.
    """

    def __init__(self, layers: list[int], of_stage: list[int], device: torch.device):
        """`layers`: numbers of the model's MoE layers; `of_stage`: those that this rank runs."""
        self._rows = [layers.index(layer) for layer in of_stage]
        # tokens, tokens that nobody took, experts that took them, the squares of these
        self._sums = torch.zeros(len(layers), 4, dtype=torch.int64, device=device)

    def add(self, plans: list[RoutingPlan]) -> None:
        """Counts a micro-batch."""
        for row, plan in zip(self._rows, plans, strict=True):
            count = plan.experts_per_token()  # (N,), whole numbers
            self._sums[row, 0] += len(count)
            self._sums[row, 1:] += torch.stack([(count == 0).sum(), count.sum(), count.square().sum()])

    def sums(self) -> Tensor:
        """To be added up over all ranks (layers, 4)."""
        return self._sums

    @staticmethod
    def record(sums: Tensor) -> dict[str, list[float]]:
        """From the sums over all ranks, on the host: one number a layer."""
        if not len(sums):
            return {}
        tokens, unrouted, experts, squares = sums.double().unbind(1)
        mean = experts / tokens
        spread = (squares / tokens - mean.square()).clamp(min=0).sqrt()
        return {
            "unrouted_share": (unrouted / tokens).tolist(),
            "experts_per_token": mean.tolist(),
            "experts_per_token_std": spread.tolist(),
        }
