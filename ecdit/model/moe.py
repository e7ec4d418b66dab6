"""The MoE layer: route, dispatch tokens to slots, run the experts, combine slots to tokens.

Shapes: `N` tokens, `M = E G C` slots, `D` hidden, `E` experts, `T` tokens of a group. Under tensor parallelism each
rank routes and combines its own tokens; N counts those.
"""

from torch import Tensor, nn

from ecdit.model.experts import Experts
from ecdit.model.kernels.slots import combine, dispatch, dispatch_fp8
from ecdit.model.router import Router, RoutingPlan
from parallel.spread import Spread


class Moe(nn.Module):
    """Sum over the experts that took a token of gate * FFN(token), (7) (8); zero where nobody took it."""

    # for engines that gather weights while a module runs: a plan is no tensor whose gradient would tell them when
    gathered_whole = True

    def __init__(self, width: int, experts: int, capacity_factor: float, routing: str, spread: Spread):
        super().__init__()
        self.spread = spread
        self.router = Router(width, experts, capacity_factor, routing, spread)
        self.experts = Experts(width, experts, spread)

    def forward(self, x: Tensor, group_tokens: int, scored: Tensor | None = None) -> tuple[Tensor, RoutingPlan]:
        """x (B, S, D) with B * S a multiple of `group_tokens` -> (B, S, D), and where the tokens went. scored
        (B, S, D): what the router reads of the tokens; None: x."""
        tokens = self.spread.own_tokens(x.reshape(-1, x.shape[-1]))
        read = tokens if scored is None else self.spread.own_tokens(scored.reshape(-1, x.shape[-1]))
        plan = self.router(read, group_tokens)
        plan.arrange(self.experts.exchange.arrange)
        slots_of = plan.slot_map()
        filled = plan.filled if plan.spanning else None  # zeros for the tokens of other tensor ranks, which send theirs
        if self.spread.dispatch_fp8:
            slots = dispatch_fp8(tokens, slots_of, filled)
        else:
            slots = dispatch(tokens, slots_of)
            slots = slots if filled is None else slots * filled[:, None]
        slots = self.experts(slots, spanning=plan.spanning)
        out = combine(slots, plan.gate, slots_of)
        return self.spread.collect_tokens(out).view_as(x), plan


class MegatronTopk(nn.Module):
    """The baseline `routing: megatron_topk`: megatron-core's dropless top-2 layer. It has no groups and no plan."""

    def __init__(self, width: int, experts: int, aux_loss: float, spread: Spread):
        super().__init__()
        self.spread = spread
        self.layer = spread.megatron_moe(width, experts, aux_loss)

    def forward(self, x: Tensor, group_tokens: int) -> tuple[Tensor, None]:
        """(B, S, D) -> (B, S, D)."""
        out = self.layer(self.spread.own_tokens(x.reshape(-1, x.shape[-1])))
        return self.spread.collect_tokens(out).view_as(x), None
