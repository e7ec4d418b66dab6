"""One pre-norm block: self-attention, cross-attention to the text, then a dense or a MoE feed-forward layer.

Shapes: `B` images, `S` tokens of an image, `L` text tokens, `D` hidden, `n` tensor ranks. Under sequence
parallelism `b = B / n` images of this rank, else `b = B`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ecdit.model.attention import CrossAttention, SelfAttention
from ecdit.model.experts import Ffn
from ecdit.model.kernels.adaln import EPSILON, modulate
from ecdit.model.router import RoutingPlan
from parallel.apex import layer_norm
from parallel.spread import Spread


def recomputed(module: Callable[..., Any], spread: Spread, *inputs: Any) -> Any:
    """What the module makes of the inputs; what it needs for the backward pass is computed again then."""
    # none where none is needed: torch.compile reads no method there
    contexts = {} if spread.fp8.kind == "none" else {"context_fn": spread.fp8.recompute_contexts}
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)


class Block(nn.Module):
    """Zero-initialised output projections make it the identity at first. `moe`: None for a dense block; router_input:
    what its router reads, its own input (modulated) or that before shift and scale (unmodulated)."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        spread: Spread,
        moe: nn.Module | None = None,
        *,
        router_input: str = "modulated",
        recompute_moe: bool = False,
    ):
        super().__init__()
        self.spread = spread
        self.modulation = spread.conditioned(width, 4 * width, bias=True, std=0.0)
        self.self_attention = SelfAttention(width, heads, kv_heads, spread)
        self.cross_attention = CrossAttention(width, heads, kv_heads, spread)
        if moe is None:
            self.ffn = Ffn(width, spread)
        else:
            self.moe = moe
        self.sparse, self.router_input, self.recompute_moe = moe is not None, router_input, recompute_moe

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, group_tokens: int
    ) -> tuple[Tensor, RoutingPlan | None]:
        """x (b, S, D), time (B, D), text (B, L, D), mask (B, 1, 1, L) -> (b, S, D), and a MoE layer's plan."""
        modulation = self.spread.features(self.modulation(F.silu(time)))
        shift1, scale1, shift2, scale2 = modulation.chunk(4, dim=-1)
        x = x + self.self_attention(modulate(x, shift1, scale1))
        x = x + self.cross_attention(x, text, mask)  # (2) (3): no norm before it
        h = modulate(x, shift2, scale2)
        if not self.sparse:
            return x + self.ffn(h), None
        inputs = (h, group_tokens)
        if self.router_input == "unmodulated":
            inputs += (layer_norm(x, EPSILON),)
        if self.recompute_moe and torch.is_grad_enabled():
            y, plan = recomputed(self.moe, self.spread, *inputs)
        else:
            y, plan = self.moe(*inputs)
        return x + y, plan
