"""Attention's Triton kernels. Scores and sums are fp32; weights are rounded to the inputs' type for the products.

Exponents are to the base 2, which the hardware has: scores are scaled by log2(e) more. A query's log_sum makes its
weights again in the backward pass.

Shapes: `B` images, `S` tokens of an image, `L` keys, `KV` key-value heads, `R` query heads that share one, `D` width of
a head. ROWS and KEYS are a block's, powers of two.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def forward(
    query, key, value, mask, out, log_sum,  # (B, S, KV, R, D), (B, L, KV, D) twice, (B, L), as query, (B, S, KV, R)
    S, L, q_image, q_token, q_group, q_head, k_image, k_token, k_group, KV, scale,
    R: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program for some queries of a head."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    there = (row < S)[:, None]
    at = image * q_image + head // R * q_group + head % R * q_head
    queries = tl.load(query + at + row[:, None] * q_token + column[None, :], mask=there, other=0.0)
    most, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, L, KEYS):
        place = image * k_image + head // R * k_group
        keys, values, seen = _block(key + place, value + place, mask, image * L, first, L, k_token, D, MASKED, KEYS)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # of a row that has seen no key yet
        weights, shrink = tl.exp2(scores - base[:, None]), tl.exp2(most - base)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision="ieee")
        most = higher
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    of_head = (image * S + row) * KV * R + head
    tl.store(out + of_head[:, None] * D + column[None, :], result / total[:, None], mask=there)
    tl.store(log_sum + of_head, tl.where(empty, 0.0, most + tl.log2(total)), mask=row < S)


@triton.jit
def backward(
    query, key, value, mask, out, log_sum, grad, grad_query, grad_key, grad_value,
    S, L, q_image, q_token, q_group, q_head, k_image, k_token, k_group,
    gq_image, gq_token, gq_group, gq_head, gk_image, gk_token, gk_group, KV, scale,
    R: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """A program for some keys of a key-value head: their gradients, and where these are all keys, the queries'."""
    first, group, image = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.arange(0, D)
    place = image * k_image + group * k_group
    keys, values, seen = _block(key + place, value + place, mask, image * L, first, L, k_token, D, MASKED, KEYS)
    of_keys, of_values = tl.zeros((KEYS, D), tl.float32), tl.zeros((KEYS, D), tl.float32)
    blocks = tl.cdiv(S, ROWS)
    for i in range(0, R * blocks):
        row, member = i % blocks * ROWS + tl.arange(0, ROWS), i // blocks
        at = query + image * q_image + group * q_group + member * q_head
        of_head = (image * S + row) * KV * R + group * R + member
        queries, slopes, weights, of_scores = _scores(
            at, out, log_sum, grad, of_head, row, S, q_token, keys, values, seen, scale, D
        )
        of_values = tl.dot(tl.trans(weights.to(slopes.dtype)), slopes, of_values, input_precision="ieee")
        of_keys = tl.dot(tl.trans(of_scores), queries, of_keys, input_precision="ieee")
        if WHOLE:
            to = grad_query + image * gq_image + group * gq_group + member * gq_head
            found = tl.dot(of_scores, keys, input_precision="ieee") * scale
            tl.store(to + row[:, None] * gq_token + column[None, :], found, mask=(row < S)[:, None])
    token = first + tl.arange(0, KEYS)
    to = image * gk_image + group * gk_group + token[:, None] * gk_token + column[None, :]
    tl.store(grad_key + to, of_keys * scale, mask=(token < L)[:, None])
    tl.store(grad_value + to, of_values, mask=(token < L)[:, None])


@triton.jit
def backward_queries(
    query, key, value, mask, out, log_sum, grad, grad_query, grad_key, grad_value,
    S, L, q_image, q_token, q_group, q_head, k_image, k_token, k_group,
    gq_image, gq_token, gq_group, gq_head, gk_image, gk_token, gk_group, KV, scale,
    R: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program for some queries of a head: their gradients, where the keys are in several blocks."""
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    at = query + image * q_image + head // R * q_group + head % R * q_head
    of_head = (image * S + row) * KV * R + head
    found = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, L, KEYS):
        place = image * k_image + head // R * k_group
        keys, values, seen = _block(key + place, value + place, mask, image * L, first, L, k_token, D, MASKED, KEYS)
        _, _, _, of_scores = _scores(at, out, log_sum, grad, of_head, row, S, q_token, keys, values, seen, scale, D)
        found = tl.dot(of_scores, keys, found, input_precision="ieee")
    to = grad_query + image * gq_image + head // R * gq_group + head % R * gq_head
    tl.store(to + row[:, None] * gq_token + column[None, :], found * scale, mask=(row < S)[:, None])


@triton.jit
def _block(key, value, mask, at, first, L, stride, D: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr):
    """A block of keys and of values (KEYS, D), zeros where there are no more, and which are to be seen (KEYS,). at:
    where the image's mask begins."""
    token = first + tl.arange(0, KEYS)
    seen = token < L
    place = token[:, None] * stride + tl.arange(0, D)[None, :]
    keys = tl.load(key + place, mask=seen[:, None], other=0.0)
    values = tl.load(value + place, mask=seen[:, None], other=0.0)
    if MASKED:
        seen = seen & (tl.load(mask + at + token, mask=seen, other=0) != 0)
    return keys, values, seen


@triton.jit
def _scores(query, out, log_sum, grad, of_head, row, S, q_token, keys, values, seen, scale, D: tl.constexpr):
    """Queries (ROWS, D), gradients of their results, their weights (ROWS, KEYS) and the gradients of the scores."""
    column = tl.arange(0, D)
    there = (row < S)[:, None]
    queries = tl.load(query + row[:, None] * q_token + column[None, :], mask=there, other=0.0)
    slopes = tl.load(grad + of_head[:, None] * D + column[None, :], mask=there, other=0.0)
    results = tl.load(out + of_head[:, None] * D + column[None, :], mask=there, other=0.0)
    along = tl.sum(slopes.to(tl.float32) * results.to(tl.float32), 1)
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
    weights = tl.exp2(scores - tl.load(log_sum + of_head, mask=row < S, other=0.0)[:, None])
    weights = tl.where(seen[None, :], weights, 0.0)
    of_weights = tl.dot(slopes, tl.trans(values), input_precision="ieee")
    return queries, slopes, weights, (weights * (of_weights - along[:, None])).to(queries.dtype)
