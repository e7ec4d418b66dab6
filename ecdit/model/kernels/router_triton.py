"""The router's Triton kernels.

Shapes: `N` tokens, `D` hidden, `E` experts, `C` capacity, `G` routing groups, `T` tokens of a group. Capitals that are
constants are a program's, all powers of two.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(2**31))
LEAST_KEY, GREATEST_KEY = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


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
    affinity, keys, token, gate,  # (G, T, E), scratch (E, G, C), (E, G, C), (E, G, C)
    T, E, C, TOKENS: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """A program finds an expert's tokens of a group by bisection, and their order by comparing each with each.

    A key is an affinity's bits, which order as the affinities do, above the index counted backwards: no two are alike,
    and of equal affinities that of the lower token is greater. What pads the group has the least bits and the greatest
    indices, so it comes last whatever the affinities are.

    These are short loops. A sort of the group is some thousand instructions that a program runs once each, and for
    which it waits longer than for anything that they do.
    """
    expert, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, TOKENS)
    values = tl.load(affinity + (group * T + index) * E + expert, mask=index < T, other=0.0)
    bits = tl.where(index < T, values.to(tl.int32, bitcast=True), LEAST)
    key = (bits.to(tl.int64) << 32) | (TOKENS - 1 - index).to(tl.int64)
    # ---- choose: C keys or more are not below `low`, fewer are not below `high`, until it is C
    low, high, found = tl.full((), LEAST_KEY, tl.int64), tl.full((), GREATEST_KEY, tl.int64), TOKENS
    while found != C:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without the sum, which may overflow
        found = tl.sum((key >= middle).to(tl.int32), 0)
        low, high = tl.where(found < C, low, middle), tl.where(found < C, middle, high)
    taken = key >= low
    row = (expert.to(tl.int64) * tl.num_programs(1) + group) * C
    tl.store(keys + row + tl.cumsum(taken.to(tl.int32), 0) - 1, key, mask=taken)
    tl.debug_barrier()  # what follows reads what other threads of the program wrote
    # ---- order: a key's place is the number of greater ones
    for first in range(0, C, BLOCK):
        at = first + tl.arange(0, BLOCK)
        own = tl.load(keys + row + at, mask=at < C, other=0)
        greater = tl.zeros((BLOCK, OTHERS), tl.int32)
        for other in range(0, C, OTHERS):
            others = other + tl.arange(0, OTHERS)
            other_keys = tl.load(keys + row + others, mask=others < C, other=LEAST_KEY)
            greater += (other_keys[None, :] > own[:, None]).to(tl.int32)
        place = row + tl.sum(greater, 1)
        tl.store(token + place, TOKENS - 1 - (own & 0xFFFFFFFF), mask=at < C)
        tl.store(gate + place, (own >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=at < C)
