"""Grouped-query self- and cross-attention on torch's scaled_dot_product_attention, on a GPU through flash attention
where it can: that takes grouped queries as they are, but no mask; the other kernels take repeated heads. cuDNN's takes
both, but a CUDA graph of its backward pass reads memory that is not its own (torch 2.11 on an H100).

megatron-core refuses grouped-query cross-attention, so both are here. Projections keep a key-value head and all that
belongs to it in consecutive rows, so that a contiguous split of the rows is a split by heads: each tensor rank has
KV / n key-value heads and what belongs to them, of all images.

Shapes: `B` images, `S` tokens of an image, `L` text tokens, `D` hidden, `H`/`KV` query/key-value heads, `d = D / H`,
`R = H / KV` query heads that share a key-value head, `n` tensor ranks. Under sequence parallelism `b = B / n` images
of this rank, else `b = B`.
"""

from contextlib import nullcontext

import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from parallel.spread import Spread

REPEATED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of query (B, S, KV, R, d) over key and value (B, L, KV, d); mask (B, 1, 1, L), True where real.

    Returns (B, S, KV R d).
    """
    b, s, kv, r, d = query.shape
    query = query.reshape(b, s, kv * r, d).transpose(1, 2)
    heads = [x.transpose(1, 2) for x in (key, value)]
    if takes_grouped_queries(query, *heads, mask):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(query, *heads, enable_gqa=True)
    else:
        key, value = (x.repeat_interleave(r, dim=1) for x in heads)
        with sdpa_kernel(REPEATED) if query.is_cuda else nullcontext():
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).reshape(b, s, kv * r * d)


def takes_grouped_queries(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether a fused kernel is here that takes fewer key-value heads than queries."""
    return query.is_cuda and can_use_flash_attention(SDPAParams(query, key, value, mask, 0.0, False, True))


class SelfAttention(nn.Module):
    """Rows of `qkv`: for each key-value head its R queries, its key, its value."""

    def __init__(self, width: int, heads: int, kv_heads: int, spread: Spread):
        super().__init__()
        self.kv_heads, self.head = kv_heads // spread.tensor_ranks, width // heads
        self.qkv = spread.linears.column(width, (heads + 2 * kv_heads) * self.head)
        self.out = spread.linears.row(width, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(b, S, D) -> (b, S, D)."""
        qkv = self.qkv(x).unflatten(-1, (self.kv_heads, -1, self.head))
        # one split, whose gradient is one concatenation; slices would each fill a whole tensor with zeros
        query, key, value = qkv.split([qkv.shape[-2] - 2, 1, 1], dim=-2)
        return self.out(attend(query, key.squeeze(-2), value.squeeze(-2)))


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
        key, value = self.key_value(text).unflatten(-1, (self.kv_heads, 2, self.head)).unbind(-2)
        return self.out(attend(query, key, value, mask))
