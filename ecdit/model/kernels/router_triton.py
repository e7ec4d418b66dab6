"""The router's Triton kernels.

Shapes: `N` tokens, `D` hidden, `E` experts, `C` capacity, `G` routing groups, `T` tokens of a group. Capitals that are
constants are a program's: TOKENS, EXPERTS, and BLOCK of the width, all powers of two.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))


@triton.jit
def affinities(
    x, weight, out,  # (N, D), (D, E), (N, E)
    N, D, E, TOKENS: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program for some tokens and all experts. EXACT: a product's precision at which these inputs lose nothing."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert, column = tl.arange(0, EXPERTS), tl.arange(0, BLOCK)
    logits = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for first in range(0, D, BLOCK):
        inside = first + column < D
        rows = tl.load(
            x + token[:, None] * D + first + column[None, :], mask=(token[:, None] < N) & inside[None, :], other=0.0
        )
        weights = tl.load(
            weight + (first + column[:, None]) * E + expert[None, :],
            mask=inside[:, None] & (expert[None, :] < E),
            other=0.0,
        )
        logits = tl.dot(rows.to(tl.float32), weights.to(tl.float32), logits, input_precision=EXACT)
    logits = tl.where(expert[None, :] < E, logits, -float("inf"))
    share = tl.exp(logits - tl.max(logits, 1)[:, None])
    share = share / tl.sum(share, 1)[:, None]
    tl.store(out + token[:, None] * E + expert[None, :], share, mask=(token[:, None] < N) & (expert[None, :] < E))


@triton.jit
def choose(
    affinity, token, gate,  # (G, T, E), (E, G, C), (E, G, C)
    T, E, C, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program sorts all tokens of a group for some experts.

    A key is an affinity's bits, which order as the affinities do, above the index counted backwards: no two are alike,
    and of equal affinities that of the lower token is greater. What pads the group has the least bits and the greatest
    indices, so it comes last whatever the affinities are.
    """
    group = tl.program_id(1).to(tl.int64)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)[:, None]
    index = tl.arange(0, TOKENS)[None, :]
    values = tl.load(affinity + (group * T + index) * E + expert, mask=(index < T) & (expert < E), other=0.0)
    bits = tl.where(index < T, values.to(tl.int32, bitcast=True), LEAST)
    keys = (bits.to(tl.int64) << 32) | (TOKENS - 1 - index).to(tl.int64)
    keys = tl.sort(keys, descending=True)
    at = (expert.to(tl.int64) * tl.num_programs(1) + group) * C + index
    taken = (index < C) & (expert < E)
    tl.store(token + at, TOKENS - 1 - (keys & 0xFFFFFFFF), mask=taken)
    tl.store(gate + at, (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=taken)
