"""The MoE layer: route, dispatch tokens to slots, run the experts, combine slots to tokens.

Dispatch and combine are each other's transposes. Both go through the plan's inverse map (a token's slots), in which
every output row is written once: no atomics, so the same sums in the same order on every run.

Shapes: `N` tokens, `M = E G C` slots, `D` hidden, `E` experts, `T` tokens of a group. Under tensor parallelism each
rank routes and combines its own tokens; N counts those.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit.model.experts import Experts
from ecdit.model.router import Router, RoutingPlan
from parallel.spread import Spread


class Moe(nn.Module):
    """Sum over the experts that took a token of gate * FFN(token), (7) (8); zero where nobody took it."""

    def __init__(self, width: int, experts: int, capacity_factor: float, routing: str, spread: Spread):
        super().__init__()
        self.spread = spread
        self.router = Router(width, experts, capacity_factor, routing, spread)
        self.experts = Experts(width, experts, spread)

    def forward(self, x: Tensor, group_tokens: int) -> tuple[Tensor, RoutingPlan]:
        """x (B, S, D) with B * S a multiple of `group_tokens` -> (B, S, D), and where the tokens went."""
        tokens = self.spread.own_tokens(x.reshape(-1, x.shape[-1]))
        plan = self.router(tokens, group_tokens)
        plan.arrange(self.experts.exchange.arrange)
        slots = Dispatch.apply(tokens, plan.token, *plan.slots_by_token)
        if plan.spanning:
            slots = slots * plan.filled[:, None]  # zeros for the tokens of other tensor ranks, which send theirs
        slots = self.experts(slots, spanning=plan.spanning)
        gate = plan.gate.to(x.dtype)
        out = Combine.apply(slots, gate, plan.token, *plan.slots_by_token)
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


def sum_slots(rows: Tensor, by_token: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums each token's slots. rows (M, D), by_token (M,), offsets (N + 1,), weight (M,) in slot order -> (N, D)."""
    return F.embedding_bag(
        by_token,
        rows,
        offsets,
        mode="sum",
        per_sample_weights=None if weight is None else weight[by_token],
        include_last_offset=True,
    )


class Dispatch(torch.autograd.Function):
    """Copies each slot's token: (N, D) -> (M, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, by_token: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(by_token, offsets)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return sum_slots(grad.contiguous(), *ctx.saved_tensors), None, None, None


class Combine(torch.autograd.Function):
    """Gate-weighted sum of each token's slots: (M, D), (M,) -> (N, D)."""

    @staticmethod
    def forward(ctx, rows: Tensor, gate: Tensor, token: Tensor, by_token: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gate, token)
        return sum_slots(rows, by_token, offsets, gate)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, gate, token = ctx.saved_tensors
        of_slot = grad.index_select(0, token)
        return of_slot * gate[:, None], torch.linalg.vecdot(of_slot, rows), None, None, None
