"""One pre-norm block: self-attention, cross-attention to the text, then a dense or a MoE feed-forward layer.

Shapes: `B` images, `S` tokens of an image, `L` text tokens, `D` hidden.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ecdit.model.attention import CrossAttention, SelfAttention
from ecdit.model.experts import Ffn
from ecdit.model.layers import Linear, modulate
from ecdit.model.moe import Moe
from ecdit.model.router import RoutingPlan


class Block(nn.Module):
    """Zero-initialised output projections make it the identity at first. `moe`: None for a dense block."""

    def __init__(self, width: int, heads: int, kv_heads: int, moe: Moe | None = None):
        super().__init__()
        self.modulation = Linear(width, 4 * width, bias=True, std=0.0)
        self.self_attention = SelfAttention(width, heads, kv_heads)
        self.cross_attention = CrossAttention(width, heads, kv_heads)
        if moe is None:
            self.ffn = Ffn(width)
        else:
            self.moe = moe
        self.sparse = moe is not None

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, group_tokens: int
    ) -> tuple[Tensor, RoutingPlan | None]:
        """x (B, S, D), time (B, D), text (B, L, D), mask (B, 1, 1, L) -> (B, S, D), and a MoE layer's plan."""
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(time)).chunk(4, dim=-1)
        x = x + self.self_attention(modulate(x, shift1, scale1))
        x = x + self.cross_attention(x, text, mask)  # (2) (3): no norm before it
        h = modulate(x, shift2, scale2)
        if not self.sparse:
            return x + self.ffn(h), None
        y, plan = self.moe(h, group_tokens)
        return x + y, plan
