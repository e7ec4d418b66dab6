"""The experts: E feed-forward networks over equal numbers of rows, and the dense one of the other blocks.

Shapes: `D` hidden, `F = 4D` expert hidden, `E` experts (those of this rank, or of a chunk of them), `R` rows of an
expert. Under expert-tensor parallelism this rank has a part of F.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ecdit.model.kernels.gelu import gelu_backward_into, gelu_into
from ecdit.model.layers import gelu
from parallel.dispatch import Way
from parallel.fp8_rows import Fp8Rows
from parallel.layers import PlainLinears
from parallel.parameters import parameter, xavier
from parallel.spread import Spread
from parallel.weight_gradients import handed_over, parts, share_kept, sum_of, weight_gradient

# Rows that ChunkedFfn works on at once: 4 MB of hidden rows at F = 1024 in fp32, a core's share of the cache.
CHUNK_ROWS = 1024


class Ffn(nn.Module):
    """The dense layer, GELU(x W1) W2."""

    def __init__(self, width: int, spread: Spread):
        super().__init__()
        self.whole = spread.dense_ffn(width, batched_ffn)
        linears = spread.linears if self.whole is None else PlainLinears()
        self.up = linears.column(width, 4 * width)
        self.down = linears.row(4 * width, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        if self.whole is None:
            return self.down(gelu(self.up(x)))
        return self.whole(x.reshape(1, -1, x.shape[-1]), self.up.weight, self.down.weight).view_as(x)


class Experts(nn.Module):
    """This rank's experts, stacked, and the exchange that brings them the tokens of all expert-parallel ranks."""

    def __init__(self, width: int, experts: int, spread: Spread):
        super().__init__()
        std = xavier(width, 4 * width)
        # each expert's as a linear's weight, (outputs, inputs): both operands of a product are then read along rows,
        # the one way that FP8 has
        self.up = parameter(experts, 4 * width, width, std=std, expert=True, splits=spread.expert_splits(1))
        self.down = parameter(experts, width, 4 * width, std=0.0, expert=True, splits=spread.expert_splits(2))
        self.exchange = spread.exchange(experts)
        self.ffns = spread.expert_ffns(experts, width, batched_ffn)

    def forward(self, rows: Tensor | Fp8Rows, *, spanning: bool = False) -> Tensor:
        """A row for every slot of all experts, in the order of `exchange`: (M, D) -> (M, D)."""
        between = partial(ExpertsBetween.apply, self.up, self.down) if self.ffns is None else None
        up, down = (parts(weight, self.exchange.chunks) for weight in (self.up, self.down))
        kernel = ChunkedFfn.apply if self.up.device.type == "cpu" else batched_ffn

        def experts(x: Tensor, chunk: int) -> Tensor:
            return (self.ffns[chunk] if self.ffns is not None else kernel)(x, up[chunk], down[chunk])

        return self.exchange(rows, experts, spanning=spanning, between=between)


def batched_ffn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """All experts at once: two batched products. x (E, R, D), up (E, F, D), down (E, D, F) -> (E, R, D)."""
    return _Products.apply(gelu(_Products.apply(x, up)), down)


class _Products(torch.autograd.Function):
    """x_e W_e^T for all experts. Plain autograd would make a weight's gradient the other way round, and copy it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return torch.bmm(x, weight.mT)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), weight = ctx.saved_tensors, ctx.weight
        return torch.bmm(grad, weight), weight_gradient(weight, grad.mT, x)


class ExpertsBetween(torch.autograd.Function):
    """The same between the ways there and back of an exchange, while rows travel.

    This rank's own rows need not travel: forward, half of them are computed while the first rows of others are on their
    way here, the rest while the last are on their way back. Backward all of them come first, and weight gradients last,
    in one product over all rows: one of fewer experts would leave more multiprocessors without a tile.

    Shapes: `n` ranks, `E` experts and `e` of a chunk; an expert's rows are those of n ranks, this one's last.
    """

    @staticmethod
    def forward(ctx, up: Tensor, down: Tensor, there: Way, back: Way, *tokens: Tensor) -> tuple[Tensor, ...]:
        """tokens: as `parallel.dispatch` has them, one a chunk."""
        rows, own = there.whole(up.dtype), there.own(up.dtype)  # (E, n, R, D), (E, R, D)
        hidden = rows.new_empty(*rows.shape[:3], up.shape[1])
        active = torch.empty_like(hidden)

        def compute(x: Tensor, out: Tensor, experts: slice, ranks: slice, part: slice = ALL) -> None:
            """A part of some ranks' rows of some experts, (e, rows, D) each."""
            first, second = (y[experts, ranks, part].flatten(1, 2) for y in (hidden, active))
            torch.bmm(x, up[experts].mT, out=first)
            gelu_into(second, first)
            torch.bmm(second, down[experts].mT, out=out)

        (some, rest), home = _halves(own), back.own_home(rows)
        compute(own[some], home[some], some[0], MINE, some[1])
        for c in range(len(tokens)):
            x = there.enter(c, up.dtype)[:, OTHERS]
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            compute(x.flatten(1, 2), y.flatten(1, 2), there.experts_of(c), OTHERS)
            back.leave(c, y)
        if own[rest].numel():
            compute(own[rest], home[rest], rest[0], MINE, rest[1])
        ctx.save_for_backward(rows, hidden, active)
        ctx.weights, ctx.ways = (up, down), (there, back)
        return tuple(token.new_empty(0) for token in tokens)

    @staticmethod
    def backward(ctx, *tokens: Tensor):
        (rows, hidden, active), (up, down), (there, back) = ctx.saved_tensors, ctx.weights, ctx.ways
        grads, own, slopes = back.whole(up.dtype), back.own(up.dtype), torch.empty_like(hidden)
        wanted = any(ctx.needs_input_grad[4:])

        def compute(grad: Tensor, out: Tensor | None, experts: slice, ranks: slice) -> None:
            first, slope = (y[experts, ranks].flatten(1, 2) for y in (hidden, slopes))
            gelu_backward_into(slope, torch.bmm(grad, down[experts]), first)
            if out is not None:
                torch.bmm(slope, up[experts], out=out)

        compute(own, there.own_home(rows) if wanted else None, ALL, MINE)
        for c in reversed(range(len(tokens))):
            grad = back.enter(c, up.dtype)[:, OTHERS]
            y = torch.empty_like(grad, memory_format=torch.contiguous_format) if wanted else None
            compute(grad.flatten(1, 2), y.flatten(1, 2) if wanted else None, there.experts_of(c), OTHERS)
            if wanted:
                there.leave(c, y)
        grad_down = weight_gradient(down, grads.flatten(1, 2).mT, active.flatten(1, 2))
        grad_up = weight_gradient(up, slopes.flatten(1, 2).mT, rows.flatten(1, 2))
        return grad_up, grad_down, None, None, *(token.new_empty(0) for token in tokens)


ALL, MINE, OTHERS = slice(None), slice(-1, None), slice(None, -1)  # the latter two: of the ranks whose rows they are


def _halves(own: Tensor) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Experts and rows of each half of (E, R, ...): half of the experts, or half of the rows of a single one."""
    experts, rows = ((size + 1) // 2 for size in own.shape[:2])
    if len(own) == 1:
        return (ALL, slice(rows)), (ALL, slice(rows, None))
    return (slice(experts), ALL), (slice(experts, None), ALL)


class ChunkedFfn(torch.autograd.Function):
    """The same, a few experts at a time, forward and backward.

    On a CPU the hidden rows of a chunk then stay in the cache between the products and the GELU; a batched product
    over all experts streams every intermediate through memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = x.new_empty(*x.shape[:2], up.shape[1])
        out = torch.empty_like(x)
        for s in _chunks(x):
            torch.bmm(x[s], up[s].mT, out=hidden[s])
            torch.bmm(gelu(hidden[s]), down[s].mT, out=out[s])
        ctx.save_for_backward(x, hidden)
        ctx.weights = up, down
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        (x, hidden), (up, down) = ctx.saved_tensors, ctx.weights
        grad_out = grad_out.contiguous()
        summed = sum_of(up) is not None
        grad_up, grad_down = (sum_of(w) if summed else torch.empty_like(w) for w in (up, down))
        beta = share_kept(up) if summed else 0.0
        grad_x = torch.empty_like(x)
        for s in _chunks(x):
            grad_gelu = torch.bmm(grad_out[s], down[s])
            grad_hidden = torch.ops.aten.gelu_backward(grad_gelu, hidden[s], approximate="tanh")
            grad_down[s].baddbmm_(grad_out[s].mT, gelu(hidden[s]), beta=beta)
            grad_up[s].baddbmm_(grad_hidden.mT, x[s], beta=beta)
            torch.bmm(grad_hidden, up[s], out=grad_x[s])
        return grad_x, *((handed_over(up), handed_over(down)) if summed else (grad_up, grad_down))


def _chunks(x: Tensor) -> list[slice]:
    """Experts by about CHUNK_ROWS rows. x (E, R, D)."""
    experts, rows, _ = x.shape
    size = max(1, CHUNK_ROWS // max(rows, 1))
    return [slice(first, first + size) for first in range(0, experts, size)]
