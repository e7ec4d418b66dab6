"""The update's Triton kernels: all slices of all tensors at once, a program for BLOCK elements of one slice.

Slices lie anywhere in memory. Their addresses are a table of integers, a row for each slice: gradients, squares,
momenta, masters, averages, the model's weights. What changes from update to update lies in memory too, so that a graph
of the kernels serves them all: correction, lr, shrink, average share, 1 or 0 for whether anything is to change, and
what gradients are multiplied by.

Shapes: `n` slices, `P` programs; slice i has the programs first[i] ... first[i + 1] - 1.
"""

import triton
import triton.language as tl

POINTERS = tl.constexpr(6)


@triton.jit
def squares(
    pointers, segment, first, sizes, numbers, partial,  # (n, 6), (P,), (n + 1,), (n,), (6,), (P,)
    keep, take, tiny, BLOCK: tl.constexpr,
):  # fmt: skip
    """The new mean square of each gradient, and the sum of the squares of the updates that follow from it.
    keep, take: the shares of the old mean and of the new square."""
    program = tl.program_id(0)
    slice = tl.load(segment + program)
    at = (program - tl.load(first + slice)) * BLOCK + tl.arange(0, BLOCK)
    here = at < tl.load(sizes + slice) * tl.load(numbers + 4).to(tl.int64)  # nowhere, if nothing is to change
    correction = tl.load(numbers).to(tl.float32)
    row = pointers + slice * POINTERS
    gradient = tl.load(_at(row, 0) + at, mask=here, other=0.0) * tl.load(numbers + 5).to(tl.float32)
    square = tl.load(_at(row, 1) + at, mask=here, other=0.0) * keep + gradient * gradient * take
    tl.store(_at(row, 1) + at, square, mask=here)
    update = gradient / tl.sqrt(square / correction + tiny)
    tl.store(partial + program, tl.sum(tl.where(here, update * update, 0.0), 0))


@triton.jit
def sums(partial, first, out, BLOCK: tl.constexpr):
    """partial (P,), first (n + 1,), out (n,): a program adds up what those of a slice have found."""
    slice = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    last = tl.load(first + slice + 1)
    for at in range(tl.load(first + slice), last, BLOCK):
        place = at + tl.arange(0, BLOCK)
        total += tl.load(partial + place, mask=place < last, other=0.0)
    tl.store(out + slice, tl.sum(total, 0))


@triton.jit
def update(
    pointers, segment, first, sizes, numbers, factor, decay,  # (n, 6), (P,), (n + 1,), (n,), (6,), (n,), (n,)
    like, share, tiny, BLOCK: tl.constexpr, AVERAGED: tl.constexpr, PUBLISHED: tl.constexpr,
):  # fmt: skip
    """Momentum, weights and their average, from gradients and new squares. factor: of each slice's updates; shares:
    how much of the new goes into momentum and average; shrink: how much of a weight decays where decay is 1; like: of
    the type of the model's weights."""
    program = tl.program_id(0)
    slice = tl.load(segment + program)
    at = (program - tl.load(first + slice)) * BLOCK + tl.arange(0, BLOCK)
    here = at < tl.load(sizes + slice) * tl.load(numbers + 4).to(tl.int64)  # nowhere, if nothing is to change
    correction, lr = tl.load(numbers).to(tl.float32), tl.load(numbers + 1).to(tl.float32)
    shrink, average_share = tl.load(numbers + 2).to(tl.float32), tl.load(numbers + 3).to(tl.float32)
    row = pointers + slice * POINTERS
    gradient = tl.load(_at(row, 0) + at, mask=here, other=0.0) * tl.load(numbers + 5).to(tl.float32)
    square = tl.load(_at(row, 1) + at, mask=here, other=0.0)
    momentum = tl.load(_at(row, 2) + at, mask=here, other=0.0)
    master = tl.load(_at(row, 3) + at, mask=here, other=0.0)
    step = gradient / tl.sqrt(square / correction + tiny) * tl.load(factor + slice)
    momentum += (step - momentum) * share
    master = master * (1 - shrink * tl.load(decay + slice)) - lr * momentum
    tl.store(_at(row, 2) + at, momentum, mask=here)
    tl.store(_at(row, 3) + at, master, mask=here)
    if AVERAGED:
        average = tl.load(_at(row, 4) + at, mask=here, other=0.0)
        tl.store(_at(row, 4) + at, average + (master - average) * average_share, mask=here)
    if PUBLISHED:
        tl.store(tl.load(row + 5).to(like.dtype) + at, master.to(like.dtype.element_ty), mask=here)


@triton.jit
def _at(row, kind: tl.constexpr):
    return tl.load(row + kind).to(tl.pointer_type(tl.float32))
