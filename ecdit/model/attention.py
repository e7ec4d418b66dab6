"""Grouped-query self- and cross-attention.

megatron-core refuses grouped-query cross-attention, so both are here. Projections keep a key-value head and all that
belongs to it in consecutive rows, so that a contiguous split of the rows is a split by heads: each tensor rank has
KV / n key-value heads and what belongs to them, of all images.

Shapes: `B` images, `S` tokens of an image, `L` text tokens, `D` hidden, `H`/`KV` query/key-value heads, `d = D / H`,
`R = H / KV` query heads that share a key-value head, `n` tensor ranks. Under sequence parallelism `b = B / n` images
of this rank, else `b = B`.
"""

from torch import Tensor, nn

from ecdit.model.kernels.attention import cross_attention, self_attention
from parallel.spread import Spread


class SelfAttention(nn.Module):
    """Rows of `qkv`: for each key-value head its R queries, its key, its value."""

    def __init__(self, width: int, heads: int, kv_heads: int, spread: Spread):
        super().__init__()
        self.kv_heads, self.head = kv_heads // spread.tensor_ranks, width // heads
        self.qkv = spread.linears.column(width, (heads + 2 * kv_heads) * self.head)
        self.out = spread.linears.row(width, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(b, S, D) -> (b, S, D)."""
        return self.out(self_attention(self.qkv(x).unflatten(-1, (self.kv_heads, -1, self.head))))


class CrossAttention(nn.Module):
    """Rows of `key_value`: for each key-value head its key, its value."""

    def __init__(self, width: int, heads: int, kv_heads: int, spread: Spread):
        super().__init__()
        self.kv_heads, self.head = kv_heads // spread.tensor_ranks, width // heads
        self.query = spread.linears.column(width, width)
        self.key_value = spread.conditioned(width, 2 * kv_heads * self.head)
        self.out = spread.linears.row(width, width, std=0.0)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """x (b, S, D), text (B, L, D), mask (B, 1, 1, L), True where a text token is real -> (b, S, D)."""
        query = self.query(x).unflatten(-1, (self.kv_heads, -1, self.head))
        key_value = self.key_value(text).unflatten(-1, (self.kv_heads, 2, self.head))
        return self.out(cross_attention(query, key_value, mask))
