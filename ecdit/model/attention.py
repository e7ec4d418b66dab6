"""Grouped-query self- and cross-attention on torch's scaled_dot_product_attention.

megatron-core refuses grouped-query cross-attention, so both are here. Projections keep a key-value head and all that
belongs to it in consecutive rows, so that a contiguous split of the rows is a split by heads.

Shapes: `B` images, `S` tokens of an image, `L` text tokens, `D` hidden, `H`/`KV` query/key-value heads, `d = D / H`,
`R = H / KV` query heads that share a key-value head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from ecdit.model.layers import Linear


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of query (B, S, KV, R, d) over key and value (B, L, KV, d); mask (B, 1, 1, L), True where real.

    Returns (B, S, D).
    """
    b, s, kv, r, d = query.shape
    query = query.reshape(b, s, kv * r, d).transpose(1, 2)
    # Key-value heads are repeated by hand: torch's fused CPU kernel has no grouped-query form.
    key, value = (x.repeat_interleave(r, dim=2).transpose(1, 2) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).reshape(b, s, kv * r * d)


class SelfAttention(nn.Module):
    """Rows of `qkv`: for each key-value head its R queries, its key, its value."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.kv_heads, self.head = kv_heads, width // heads
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head)
        self.out = Linear(width, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        qkv = self.qkv(x).unflatten(-1, (self.kv_heads, -1, self.head))
        return self.out(attend(qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]))


class CrossAttention(nn.Module):
    """Rows of `key_value`: for each key-value head its key, its value."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.kv_heads, self.head = kv_heads, width // heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * kv_heads * self.head)
        self.out = Linear(width, width, std=0.0)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), text (B, L, D), mask (B, 1, 1, L), True where a text token is real -> (B, S, D)."""
        query = self.query(x).unflatten(-1, (self.kv_heads, -1, self.head))
        kv = self.key_value(text).unflatten(-1, (self.kv_heads, 2, self.head))
        return self.out(attend(query, kv[..., 0, :], kv[..., 1, :], mask))
