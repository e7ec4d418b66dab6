"""The Triton kernels of dispatch, combine and the map between tokens and slots.

Shapes: `N` tokens, `M` slots, `D` hidden, `E` experts, `R = M / E` consecutive slots of an expert. BLOCK, TOKENS and
EXPERTS are a program's, powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def place(
    token, filled, table,  # (M,), (M,), (N, E)
    M, R, E, HOLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes each slot into the table, by its token and expert. No two go to the same place."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = slot < M
    if HOLES:
        here = here & (tl.load(filled + slot, mask=here, other=0) != 0)
    tl.store(table + tl.load(token + slot, mask=here, other=0) * E + slot // R, slot, mask=here)


@triton.jit
def count(
    table, counts,  # (N, E), (N + 1,)
    N, E, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Slots of each token, after a 0."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slots = _rows_of(table, token, N, E, EXPERTS)
    tl.store(counts + 1 + token, tl.sum((slots >= 0).to(tl.int32), 1), mask=token < N)
    if tl.program_id(0) == 0:
        tl.store(counts, 0)


@triton.jit
def list_slots(
    table, offsets, slots,  # (N, E), (N + 1,), (M,)
    N, E, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Each token's slots, in the order of the experts, from its offset on."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    found = _rows_of(table, token, N, E, EXPERTS)
    there = (found >= 0).to(tl.int32)
    place = tl.load(offsets + token, mask=token < N, other=0)[:, None] + tl.cumsum(there, 1) - there
    tl.store(slots + place, found, mask=found >= 0)


@triton.jit
def _rows_of(table, token, N, E, EXPERTS: tl.constexpr):
    expert = tl.arange(0, EXPERTS)
    at = token.to(tl.int64)[:, None] * E + expert[None, :]
    return tl.load(table + at, mask=(token[:, None] < N) & (expert[None, :] < E), other=-1)


@triton.jit
def gather(x, token, rows, D, BLOCK: tl.constexpr):
    """x (N, D), token (M,), rows (M, D): a program for each slot."""
    slot = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + tl.load(token + slot) * D + column, mask=column < D)
    tl.store(rows + slot * D + column, values, mask=column < D)


@triton.jit
def gather_fp8(
    x, slots, offsets, rows, scale,  # (N, D), (M,), (N + 1,), (M, D), (M,)
    D, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each token: it reads and casts its row once for all of its slots. Quotients are rounded as IEEE
    asks, so that these are the twin's numbers."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    unit = tl.where(largest > LEAST, tl.div_rn(largest, LARGEST), 1.0)
    values = values * tl.where(largest > LEAST, tl.div_rn(LARGEST, largest), 1.0)
    values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST).to(tl.float8e4nv)
    for i in range(tl.load(offsets + token), tl.load(offsets + token + 1)):
        slot = tl.load(slots + i).to(tl.int64)
        tl.store(rows + slot * D + column, values, mask=column < D)
        tl.store(scale + slot, unit)


@triton.jit
def sum_slots(
    rows, weight, slots, offsets, out,  # (M, D), (M,), (M,), (N + 1,), (N, D)
    D, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each token, in fp32 whatever the type of the rows."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(offsets + token), tl.load(offsets + token + 1)):
        slot = tl.load(slots + i).to(tl.int64)
        values = tl.load(rows + slot * D + column, mask=column < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            values = values * tl.load(weight + slot).to(tl.float32)
        total += values
    tl.store(out + token * D + column, total, mask=column < D)


@triton.jit
def combine_backward(
    grad, rows, gate, slots, offsets,  # (N, D), (M, D), (M,), (M,), (N + 1,)
    grad_rows, grad_gate,  # (M, D), (M,)
    D, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each token: it reads its gradient once for all of its slots, and each slot's row once."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    slope = tl.load(grad + token * D + column, mask=column < D, other=0.0).to(tl.float32)
    for i in range(tl.load(offsets + token), tl.load(offsets + token + 1)):
        slot = tl.load(slots + i).to(tl.int64)
        values = tl.load(rows + slot * D + column, mask=column < D, other=0.0).to(tl.float32)
        tl.store(grad_gate + slot, tl.sum(slope * values, 0))
        tl.store(grad_rows + slot * D + column, slope * tl.load(gate + slot).to(tl.float32), mask=column < D)
