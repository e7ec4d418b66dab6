"""Grouped-query attention of images to themselves and to their texts.

The kernels read queries, keys and values where the projections left them and write gradients where those want them, a
key-value head's keys once for all queries that share it. An image's tokens and a text are a few hundred: where all
keys fit into one block, the backward pass is a single kernel. Torch's own kernels, the twin, take masks or grouped
queries but not both, and copy what they read and what they find.

Shapes: `B` images, `S` tokens of an image, `L` keys, `KV` key-value heads, `R` query heads that share one, `d` width of
a head.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from parallel import kernels
from parallel.kernels import operator, power_of_two

REPEATED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LEAST = 16  # rows of a block: what a product of the tensor cores takes
# Queries and keys of a block, at most, and how a program is compiled: the fastest that were tried on an H100. In the
# backward pass it depends on whether the keys fit into one block.
FORWARD = 64, 64, {"num_warps": 4}
BACKWARD = {True: (128, 128, {"num_warps": 8, "num_stages": 1}), False: (64, 128, {"num_warps": 4, "num_stages": 2})}


def self_attention(qkv: Tensor) -> Tensor:
    """qkv (B, S, KV, R + 2, d): of each key-value head its queries, its key, its value -> (B, S, KV R d)."""
    if takes(qkv):
        return _Attend.apply(qkv, None, None)
    return attend(*_parts(qkv, None))


def cross_attention(query: Tensor, key_value: Tensor, mask: Tensor) -> Tensor:
    """query (B, S, KV, R, d), key_value (B, L, KV, 2, d), mask (B, 1, 1, L), True where a key is real ->
    (B, S, KV R d). What sees no key at all is zero."""
    if takes(query):
        # one text, or one mask, may be all images'
        key_value, mask = (x.expand(len(query), *x.shape[1:]) for x in (key_value, mask))
        return _Attend.apply(query, key_value, mask.flatten(1))
    return attend(*_parts(query, key_value), mask)


def takes(query: Tensor) -> bool:
    """Whether the kernels compute it: of bf16 alone, for tensor cores round fp32."""
    width = query.shape[-1]
    return kernels.use_triton(query) and query.dtype == torch.bfloat16 and LEAST <= width == power_of_two(width) <= 128


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """By torch's kernels: query (B, S, KV, R, d), key and value (B, L, KV, d) -> (B, S, KV R d).

    On a GPU not by cuDNN's: a CUDA graph of its backward pass reads memory that is not its own (torch 2.11, H100).
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
    """Whether torch has a fused kernel here that takes fewer key-value heads than queries."""
    return query.is_cuda and can_use_flash_attention(SDPAParams(query, key, value, mask, 0.0, False, True))


class _Attend(torch.autograd.Function):
    """Of queries and keys as `self_attention` (keys: None) or `cross_attention` has them; mask (B, L)."""

    @staticmethod
    def forward(ctx, queries: Tensor, keys: Tensor | None, mask: Tensor | None) -> Tensor:
        queries, keys, mask = _rows(queries), _rows(keys), None if mask is None else mask.contiguous()
        query, _, _ = _parts(queries, keys)
        out = query.new_empty(query.shape)
        log_sum = query.new_empty(query.shape[:-1], dtype=torch.float32)
        _attend(queries, keys, mask, out, log_sum)
        ctx.save_for_backward(queries, keys, mask, out, log_sum)
        return out.flatten(2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        queries, keys, mask, out, log_sum = ctx.saved_tensors
        grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        grad_keys = None if keys is None else torch.empty_like(keys, memory_format=torch.contiguous_format)
        _attend_backward(queries, keys, mask, out, log_sum, grad.contiguous(), grad_queries, grad_keys)
        return grad_queries, grad_keys, None


def _rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _parts(queries: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """query (B, S, KV, R, d), key and value (B, L, KV, d): views."""
    if keys is None:
        # one split, whose gradient is one concatenation; slices would each fill a whole tensor with zeros
        query, key, value = queries.split([queries.shape[-2] - 2, 1, 1], dim=-2)
        return query, key.squeeze(-2), value.squeeze(-2)
    return queries, *keys.unbind(-2)


@operator("attend(Tensor queries, Tensor? keys, Tensor? mask, Tensor(a!) out, Tensor(b!) log_sum)")
def _attend(queries: Tensor, keys: Tensor | None, mask: Tensor | None, out: Tensor, log_sum: Tensor) -> None:
    """out (B, S, KV, R, d), log_sum (B, S, KV, R): of a query's weights, to the base 2."""
    from ecdit.model.kernels import attention_triton

    query, key, value = _parts(queries, keys)
    images, tokens, kv, shared, width = query.shape
    most_rows, most_keys, how = FORWARD
    rows, block = _block(tokens, most_rows), _block(key.shape[1], most_keys)
    attention_triton.forward[(-(-tokens // rows), kv * shared, images)](
        query, key, value, mask, out, log_sum, tokens, key.shape[1], *query.stride()[:-1], *key.stride()[:-1], kv,
        width**-0.5, R=shared, D=width, MASKED=mask is not None, ROWS=rows, KEYS=block, **how,
    )  # fmt: skip


@operator(
    "attend_backward(Tensor queries, Tensor? keys, Tensor? mask, Tensor out, Tensor log_sum, Tensor grad, "
    "Tensor(a!) grad_queries, Tensor(b!)? grad_keys)"
)
def _attend_backward(
    queries: Tensor, keys: Tensor | None, mask: Tensor | None, out: Tensor, log_sum: Tensor, grad: Tensor,
    grad_queries: Tensor, grad_keys: Tensor | None,
) -> None:  # fmt: skip
    from ecdit.model.kernels import attention_triton

    (query, key, value), of_inputs = _parts(queries, keys), _parts(grad_queries, grad_keys)
    images, tokens, kv, shared, width = query.shape
    length = key.shape[1]
    most_rows, most_keys, how = BACKWARD[length <= BACKWARD[True][1]]
    rows, block = _block(tokens, most_rows), _block(length, most_keys)
    blocks = -(-length // block)
    tensors = query, key, value, mask, out, log_sum, grad, *of_inputs
    strides = [n for x in (query, key, of_inputs[0], of_inputs[1]) for n in x.stride()[:-1]]
    sizes = tokens, length, *strides, kv, width**-0.5
    shape = {"R": shared, "D": width, "MASKED": mask is not None, "ROWS": rows, "KEYS": block, **how}
    attention_triton.backward[(blocks, kv, images)](*tensors, *sizes, WHOLE=blocks == 1, **shape)
    if blocks > 1:
        attention_triton.backward_queries[(-(-tokens // rows), kv * shared, images)](*tensors, *sizes, **shape)


def _block(count: int, most: int) -> int:
    return min(most, max(LEAST, power_of_two(count)))
