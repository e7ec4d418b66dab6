"""What is told of a step's routing: exact over the whole global batch, whatever the layout and the micro-batch."""

import torch
from torch import Tensor

from ecdit.model.router import RoutingPlan


class RoutingStatistics:
    """Share of tokens that no expert took, mean and spread of the experts per token, of each MoE layer in a step.

    Sums stay on the device until `record`.
    """

    def __init__(self, layers: list[int], of_stage: list[int], device: torch.device):
        """`layers`: numbers of the model's MoE layers; `of_stage`: those that this rank runs, one after the other."""
        # tokens, tokens that nobody took, experts that took them, the squares of these
        self._sums = torch.zeros(len(layers), 4, dtype=torch.int64, device=device)
        first = layers.index(of_stage[0]) if of_stage else 0
        self._own = self._sums[first : first + len(of_stage)]

    def add(self, plans: list[RoutingPlan]) -> None:
        """Counts a micro-batch, all layers at once: on a GPU, starting a sum takes longer than the sum."""
        if not plans:
            return
        assert len(plans) == len(self._own)
        count = torch.stack([plan.experts_per_token() for plan in plans])  # (layers, N), whole numbers
        self._own[:, 0] += count.shape[1]
        self._own[:, 1:] += torch.stack([(count == 0).sum(1), count.sum(1), count.square().sum(1)], dim=1)

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
