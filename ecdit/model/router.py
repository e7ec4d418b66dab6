"""Which tokens go to which expert: expert choice, and the token-choice baseline, as one kind of plan.

Both have static shapes: every expert has exactly C slots in every group. Under expert choice each slot holds a token;
under token choice with a capacity some slots stay empty and some choices are dropped.

Shapes: `N = G T` tokens, `D` hidden, `E` experts, `C` capacity, `G` routing groups, `T` tokens of a group,
`M = E G C` slots, expert-major, so that an expert's slots are consecutive, until a plan is arranged for the exchange.

Under tensor parallelism a rank routes its own tokens. Where these make whole groups, no rank needs another's scores;
where a group spans the tensor ranks, its scores are gathered, never its tokens, and every rank makes the same choice
and keeps its part of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit.model.kernels.router import affinities, choose
from ecdit.model.kernels.slots import SlotMap, slot_map
from parallel.parameters import parameter
from parallel.spread import Spread


@dataclass
class RoutingPlan:
    """Who computes what in one MoE layer.

    token (M,): the token in each slot, counted over all groups. gate (M,): its weight in the sum, differentiable.
    filled (M,): False where a slot is empty (its gate is 0 and its token a stand-in); None: all are filled.
    aux: auxiliary loss, unweighted, or None. spanning: whether other tensor ranks fill the slots that are empty here.
    """

    token: Tensor
    gate: Tensor
    tokens: int
    experts: int
    filled: Tensor | None = None
    aux: Tensor | None = None
    spanning: bool = False

    def part(self, first: int, tokens: int) -> "RoutingPlan":
        """What is left of it for the rank that has tokens first ... first + tokens - 1."""
        here = (self.token >= first) & (self.token < first + tokens)
        # a slot of another rank stands for some token of its own, so that no token gathers all of them
        stand_in = torch.arange(len(self.token), device=self.token.device) % tokens
        return RoutingPlan(
            torch.where(here, self.token - first, stand_in),
            torch.where(here, self.gate, 0.0),
            tokens,
            self.experts,
            here if self.filled is None else here & self.filled,
            self.aux,
            spanning=True,
        )

    def arrange(self, order: Callable[[Tensor], Tensor]) -> None:
        """Brings the slots into another order."""
        self.token, self.gate = order(self.token), order(self.gate)
        if self.filled is not None:
            self.filled = order(self.filled)

    def slot_map(self) -> SlotMap:
        """The inverse map, from each token to its slots, of the slots as they are arranged."""
        return slot_map(self.token, self.filled, self.tokens, self.experts)

    def experts_per_token(self) -> Tensor:
        """(N,): how many experts took each token."""
        ones = torch.ones_like(self.token) if self.filled is None else self.filled.long()
        # not bincount, whose result's size a GPU's host would have to wait for
        return ones.new_zeros(self.tokens).index_add_(0, self.token, ones)


class Router(nn.Module):
    """Scores and choices. `routing` is expert_choice or token_choice."""

    def __init__(self, width: int, experts: int, capacity_factor: float, routing: str, spread: Spread):
        super().__init__()
        self.experts, self.capacity_factor, self.spread = experts, capacity_factor, spread
        self.weight = parameter(width, experts, std=width**-0.5, reads_own_tokens=True)
        self.choose = {"expert_choice": expert_choice, "token_choice": token_choice}[routing]

    def forward(self, x: Tensor, group_tokens: int) -> RoutingPlan:
        """x (N, D), its groups consecutive. Affinities (5) are computed in fp32 whatever the type of x."""
        affinity = affinities(x, self.weight)
        capacity = int(group_tokens * self.capacity_factor / self.experts)
        spanning = len(x) % group_tokens != 0
        if spanning:
            affinity = self.spread.gather_scores(affinity)
        plan = self.choose(affinity.view(-1, group_tokens, self.experts), capacity)
        if spanning:
            plan = plan.part(self.spread.tensor_rank * len(x), len(x))
        if plan.aux is not None:
            plan.aux = self.spread.mean_over_tokens(plan.aux)
        return plan


def expert_choice(affinity: Tensor, capacity: int) -> RoutingPlan:
    """Each expert takes its top-C tokens of each group (6). affinity (G, T, E)."""
    groups, tokens, experts = affinity.shape
    chosen, gate = choose(affinity, capacity)  # (E, G, C)
    first = torch.arange(0, groups * tokens, tokens, device=affinity.device)[:, None]
    return RoutingPlan((chosen + first).flatten(), gate.flatten(), groups * tokens, experts)


def token_choice(affinity: Tensor, capacity: int) -> RoutingPlan:
    """GShard's top-2 gating with capacity: first choices before second, each in the order of the tokens.

    affinity (G, T, E). Gates are renormalised over the two choices; choices over capacity are dropped. The auxiliary
    loss is E sum_e (share of first choices) (mean affinity), mean over groups (Lepikhin et al. 2020).
    """
    groups, tokens, experts = affinity.shape
    device = affinity.device
    # ---- choose: stable, so that ties go to the lower expert as the oracle's do
    choice = affinity.detach().sort(dim=-1, descending=True, stable=True).indices[..., :2]  # (G, T, 2)
    gate = affinity.gather(-1, choice)
    gate = gate / gate.sum(-1, keepdim=True)
    first = F.one_hot(choice[..., 0], experts).to(affinity.dtype).mean(1)
    aux = experts * (first * affinity.mean(1)).sum(-1).mean()
    # ---- queue: (G, 2T), first choices of all tokens, then second ones; a place is the number of earlier ones
    expert = choice.transpose(1, 2).reshape(groups, 2 * tokens)
    place = F.one_hot(expert, experts).cumsum(1).gather(-1, expert[..., None]).squeeze(-1) - 1
    group = torch.arange(groups, device=device)[:, None]
    slot = (expert * groups + group) * capacity + place
    slots = experts * groups * capacity
    slot = torch.where(place < capacity, slot, slots).flatten()  # one slot too many catches what is dropped
    # ---- fill
    token = (group * tokens + torch.arange(2 * tokens, device=device) % tokens).flatten()
    # an empty slot stands for some token of its own, so that no token gathers all of them
    stand_in = torch.arange(slots + 1, device=device) % (groups * tokens)
    filled = torch.zeros(slots + 1, dtype=torch.bool, device=device).scatter(0, slot, True)[:-1]
    return RoutingPlan(
        stand_in.scatter(0, slot, token)[:-1],
        gate.new_zeros(slots + 1).scatter(0, slot, gate.transpose(1, 2).flatten())[:-1],
        groups * tokens,
        experts,
        filled,
        aux,
    )
