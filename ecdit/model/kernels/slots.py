"""Tokens to slots and back: dispatch copies each slot's token, combine sums each token's slots by their gates.

They are each other's transposes. Sums go through the inverse map (a token's slots), in which every output row is
written once: no atomics, so the same sums in the same order on every run.

Shapes: `N` tokens, `M` slots, `D` hidden, `E` experts. An expert's slots are consecutive.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import kernels
from parallel.fp8_rows import FP8, Fp8Rows, carrier
from parallel.kernels import operator, power_of_two, warps

FP8_LARGEST = 448.0
FP8_LEAST = 1e-30  # a row with no larger number is zeros: the inverse of its scale may not be a number
SLOTS = 1024  # of a program of `place`
ENTRIES = 4096  # of the table of tokens and experts, in a program of `count` and `list`


@dataclass(frozen=True)
class SlotMap:
    """token (M,): of each slot. Token n's slots are slots[offsets[n] : offsets[n + 1]], ascending.

    `holes`: whether some slots are empty. Such a slot has some token for a stand-in, which may list it; so its gate is
    0, and the gradient of its row is to be 0.
    """

    token: Tensor
    slots: Tensor
    offsets: Tensor
    holes: bool


def slot_map(token: Tensor, filled: Tensor | None, tokens: int, experts: int) -> SlotMap:
    """The inverse of token (M,), each in 0 ... N - 1; filled (M,): False where a slot is empty; None: all are filled.

    An expert has a token once at most.
    """
    if kernels.use_triton(token):
        table = token.new_full((tokens, experts), -1, dtype=torch.int32)
        _place(token, filled, table)
        counts = token.new_empty(tokens + 1, dtype=torch.int32)
        _count(table, counts)
        offsets = counts.cumsum(0, dtype=torch.int32)
        make = torch.empty_like if filled is None else torch.zeros_like  # empty slots are in no list
        slots = make(token, dtype=torch.int32)
        _list_slots(table, offsets, slots)
        return SlotMap(token, slots, offsets, filled is not None)
    slots = torch.argsort(token, stable=True)
    # not bincount, whose result's size a GPU's host would have to wait for
    counts = slots.new_zeros(tokens).index_add_(0, token, torch.ones_like(token))
    return SlotMap(token, slots, F.pad(counts.cumsum(0), (1, 0)), filled is not None)


def dispatch(x: Tensor, where: SlotMap) -> Tensor:
    """Copies each slot's token: (N, D) -> (M, D)."""
    return _Dispatch.apply(x, where.token, where.slots, where.offsets)


def combine(rows: Tensor, gate: Tensor, where: SlotMap) -> Tensor:
    """Gate-weighted sum of each token's slots: (M, D), (M,) -> (N, D), in the type of the rows."""
    return _Combine.apply(rows, gate, where.token, where.slots, where.offsets, where.holes)


def dispatch_fp8(x: Tensor, where: SlotMap, filled: Tensor | None = None) -> Fp8Rows:
    """`dispatch` for rows that travel as FP8 (e4m3), each with a scale with which its largest number just fits:
    (N, D) -> (M, D), the rows of slots that are not `filled` (M,) zeros. Their gradient is in the type of x."""
    return Fp8Rows(*_DispatchFp8.apply(x, where.token, where.slots, where.offsets, where.holes, filled))


def sum_slots(rows: Tensor, slots: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sums each token's slots, weighted where asked; slots, offsets as in `SlotMap`. rows (M, D), weight (M,)
    -> (N, D)."""
    if kernels.use_triton(rows):
        out = rows.new_empty(len(offsets) - 1, rows.shape[1])
        _sum_slots(rows.contiguous(), weight, slots, offsets, out)
        return out
    return F.embedding_bag(
        slots,
        rows.contiguous(),
        offsets,
        mode="sum",
        per_sample_weights=None if weight is None else weight.to(rows.dtype)[slots],
        include_last_offset=True,
    )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, slots: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(slots, offsets)
        if not kernels.use_triton(x):
            return x.index_select(0, token)
        rows = x.new_empty(len(token), x.shape[1])
        _gather(x.contiguous(), token, rows)
        return rows

    @staticmethod
    def backward(ctx, grad: Tensor):
        return sum_slots(grad, *ctx.saved_tensors), None, None, None


class _DispatchFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, token: Tensor, slots: Tensor, offsets: Tensor, holes: bool, filled: Tensor | None):
        ctx.save_for_backward(slots, offsets, filled)
        numbers, scale = (_fp8_kernel if kernels.use_triton(x) else _fp8_twin)(x, token, slots, offsets, holes)
        scale = scale if filled is None else scale * filled
        ctx.mark_non_differentiable(numbers, scale)
        return carrier(x, len(token)), numbers, scale

    @staticmethod
    def backward(ctx, grad: Tensor, _numbers: None, _scale: None):
        slots, offsets, filled = ctx.saved_tensors
        grad = grad if filled is None else grad * filled[:, None]
        return sum_slots(grad, slots, offsets), None, None, None, None, None


def _fp8_kernel(x: Tensor, token: Tensor, slots: Tensor, offsets: Tensor, holes: bool) -> tuple[Tensor, Tensor]:
    make = torch.zeros if holes else torch.empty  # no token comes by an empty slot
    numbers = make(len(token), x.shape[1], dtype=FP8, device=x.device)
    scale = make(len(token), dtype=torch.float32, device=x.device)
    _gather_fp8(x.contiguous(), slots, offsets, numbers, scale)
    return numbers, scale


def _fp8_twin(x: Tensor, token: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    x = x.float()
    largest = x.abs().amax(1)
    # by a tensor: CUDA divides by a number through its inverse, which rounds otherwise
    limit, some = torch.full_like(largest, FP8_LARGEST), largest > FP8_LEAST
    scaled = x * torch.where(some, limit / largest, 1.0)[:, None]
    numbers = scaled.clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8).view(torch.uint8)
    return numbers.index_select(0, token).view(FP8), torch.where(some, largest / limit, 1.0).index_select(0, token)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, gate: Tensor, token: Tensor, slots: Tensor, offsets: Tensor, holes: bool) -> Tensor:
        ctx.holes = holes
        ctx.save_for_backward(rows, gate, token, slots, offsets)
        return sum_slots(rows, slots, offsets, gate)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, gate, token, slots, offsets = ctx.saved_tensors
        if not kernels.use_triton(grad):
            of_slot = grad.index_select(0, token)
            by_gate = of_slot * gate.to(rows.dtype)[:, None]
            return by_gate, torch.linalg.vecdot(of_slot, rows).to(gate.dtype), None, None, None, None
        make = torch.zeros_like if ctx.holes else torch.empty_like  # no token comes by an empty slot
        grad_rows, grad_gate = make(rows), make(gate)
        _combine_backward(grad.contiguous(), rows.contiguous(), gate, slots, offsets, grad_rows, grad_gate)
        return grad_rows, grad_gate, None, None, None, None


@operator("place(Tensor token, Tensor? filled, Tensor(a!) table)")
def _place(token: Tensor, filled: Tensor | None, table: Tensor) -> None:
    """table (N, E): each expert's slot that a token is in."""
    from ecdit.model.kernels import slots_triton

    experts = table.shape[1]
    slots_triton.place[(-(-len(token) // SLOTS),)](
        token, filled, table, len(token), len(token) // experts, experts, HOLES=filled is not None, BLOCK=SLOTS
    )


@operator("count(Tensor table, Tensor(a!) counts)")
def _count(table: Tensor, counts: Tensor) -> None:
    """counts (N + 1,): 0, then the slots of each token."""
    from ecdit.model.kernels import slots_triton

    grid, blocks = _table_blocks(table)
    slots_triton.count[grid](table, counts, *table.shape, **blocks)


@operator("list_slots(Tensor table, Tensor offsets, Tensor(a!) slots)")
def _list_slots(table: Tensor, offsets: Tensor, slots: Tensor) -> None:
    from ecdit.model.kernels import slots_triton

    grid, blocks = _table_blocks(table)
    slots_triton.list_slots[grid](table, offsets, slots, *table.shape, **blocks)


def _table_blocks(table: Tensor) -> tuple[tuple[int], dict[str, int]]:
    tokens, experts = table.shape
    padded = power_of_two(experts)
    block = max(1, ENTRIES // padded)
    return (-(-tokens // block),), {"TOKENS": block, "EXPERTS": padded}


@operator("gather(Tensor x, Tensor token, Tensor(a!) rows)")
def _gather(x: Tensor, token: Tensor, rows: Tensor) -> None:
    from ecdit.model.kernels import slots_triton

    block = power_of_two(x.shape[1])
    slots_triton.gather[(len(token),)](x, token, rows, x.shape[1], BLOCK=block, num_warps=warps(block))


@operator("gather_fp8(Tensor x, Tensor slots, Tensor offsets, Tensor(a!) rows, Tensor(b!) scale)")
def _gather_fp8(x: Tensor, slots: Tensor, offsets: Tensor, rows: Tensor, scale: Tensor) -> None:
    from ecdit.model.kernels import slots_triton

    (tokens, width), block = x.shape, power_of_two(x.shape[1])
    slots_triton.gather_fp8[(tokens,)](
        x, slots, offsets, rows, scale, width, LARGEST=FP8_LARGEST, LEAST=FP8_LEAST, BLOCK=block, num_warps=warps(block)
    )


@operator("sum_slots(Tensor rows, Tensor? weight, Tensor slots, Tensor offsets, Tensor(a!) out)")
def _sum_slots(rows: Tensor, weight: Tensor | None, slots: Tensor, offsets: Tensor, out: Tensor) -> None:
    from ecdit.model.kernels import slots_triton

    tokens, width = out.shape
    block = power_of_two(width)
    slots_triton.sum_slots[(tokens,)](
        rows, weight, slots, offsets, out, width, WEIGHTED=weight is not None, BLOCK=block, num_warps=warps(block)
    )


@operator(
    "combine_backward(Tensor grad, Tensor rows, Tensor gate, Tensor slots, Tensor offsets, Tensor(a!) grad_rows, "
    "Tensor(b!) grad_gate)"
)
def _combine_backward(
    grad: Tensor, rows: Tensor, gate: Tensor, slots: Tensor, offsets: Tensor, grad_rows: Tensor, grad_gate: Tensor
) -> None:
    from ecdit.model.kernels import slots_triton

    tokens, width = grad.shape
    block = power_of_two(width)
    slots_triton.combine_backward[(tokens,)](
        grad, rows, gate, slots, offsets, grad_rows, grad_gate, width, BLOCK=block, num_warps=warps(block)
    )
