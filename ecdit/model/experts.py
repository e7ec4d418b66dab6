"""The experts: E feed-forward networks over equal numbers of rows, and the dense one of the other blocks.

Shapes: `D` hidden, `F = 4D` expert hidden, `E` experts (those of this rank, or of a chunk of them), `R` rows of an
expert. Under expert-tensor parallelism this rank has a part of F.
"""

import torch
from torch import Tensor, nn

from ecdit.model.layers import gelu
from parallel.parameters import parameter, xavier
from parallel.spread import Spread

# Rows that ChunkedFfn works on at once: 4 MB of hidden rows at F = 1024 in fp32, a core's share of the cache.
CHUNK_ROWS = 1024


class Ffn(nn.Module):
    """The dense layer, GELU(x W1) W2."""

    def __init__(self, width: int, spread: Spread):
        super().__init__()
        self.up = spread.linears.column(width, 4 * width)
        self.down = spread.linears.row(4 * width, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down(gelu(self.up(x)))


class Experts(nn.Module):
    """This rank's experts, stacked, and the exchange that brings them the tokens of all expert-parallel ranks."""

    def __init__(self, width: int, experts: int, spread: Spread):
        super().__init__()
        std = xavier(width, 4 * width)
        self.w1 = parameter(experts, width, 4 * width, std=std, expert=True, splits=spread.expert_splits(2))
        self.w2 = parameter(experts, 4 * width, width, std=0.0, expert=True, splits=spread.expert_splits(1))
        self.exchange = spread.exchange(experts)

    def forward(self, rows: Tensor, *, spanning: bool = False) -> Tensor:
        """A row for every slot of all experts, in the order of `exchange`: (M, D) -> (M, D)."""
        w1, w2 = (w.chunk(self.exchange.chunks) if self.exchange.chunks > 1 else [w] for w in (self.w1, self.w2))
        kernel = ChunkedFfn.apply if rows.device.type == "cpu" else batched_ffn
        return self.exchange(rows, lambda x, chunk: kernel(x, w1[chunk], w2[chunk]), spanning=spanning)


def batched_ffn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """All experts at once: two batched products. x (E, R, D), w1 (E, D, F), w2 (E, F, D) -> (E, R, D)."""
    return torch.bmm(gelu(torch.bmm(x, w1)), w2)


class ChunkedFfn(torch.autograd.Function):
    """The same, a few experts at a time, forward and backward.

    On a CPU the hidden rows of a chunk then stay in the cache between the products and the GELU; a batched product
    over all experts streams every intermediate through memory.
    """

    @staticmethod
    def forward(ctx, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        hidden = x.new_empty(*x.shape[:2], w1.shape[-1])
        out = torch.empty_like(x)
        for s in _chunks(x):
            torch.bmm(x[s], w1[s], out=hidden[s])
            torch.bmm(gelu(hidden[s]), w2[s], out=out[s])
        ctx.save_for_backward(x, hidden, w1, w2)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor):
        x, hidden, w1, w2 = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad_x, grad_w1, grad_w2 = torch.empty_like(x), torch.empty_like(w1), torch.empty_like(w2)
        for s in _chunks(x):
            grad_gelu = torch.bmm(grad_out[s], w2[s].mT)
            grad_hidden = torch.ops.aten.gelu_backward(grad_gelu, hidden[s], approximate="tanh")
            torch.bmm(gelu(hidden[s]).mT, grad_out[s], out=grad_w2[s])
            torch.bmm(x[s].mT, grad_hidden, out=grad_w1[s])
            torch.bmm(grad_hidden, w1[s].mT, out=grad_x[s])
        return grad_x, grad_w1, grad_w2


def _chunks(x: Tensor) -> list[slice]:
    """Experts by about CHUNK_ROWS rows. x (E, R, D)."""
    experts, rows, _ = x.shape
    size = max(1, CHUNK_ROWS // max(rows, 1))
    return [slice(first, first + size) for first in range(0, experts, size)]
