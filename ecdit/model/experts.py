"""The experts: E feed-forward networks over equal numbers of rows, and the dense one of the other blocks.

Shapes: `D` hidden, `F = 4D` expert hidden, `E` experts, `R` rows of an expert.
"""

import torch
from torch import Tensor, nn

from ecdit.model.layers import gelu, parameter, xavier

# Rows that ChunkedFfn works on at once: 4 MB of hidden rows at F = 1024 in fp32, a core's share of the cache.
CHUNK_ROWS = 1024


class Ffn(nn.Module):
    """The dense layer, GELU(x W1) W2."""

    def __init__(self, width: int):
        super().__init__()
        self.w1 = parameter(width, 4 * width, std=xavier(width, 4 * width))
        self.w2 = parameter(4 * width, width, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return gelu(x @ self.w1) @ self.w2


class Experts(nn.Module):
    """E such layers, stacked."""

    def __init__(self, width: int, experts: int):
        super().__init__()
        self.w1 = parameter(experts, width, 4 * width, std=xavier(width, 4 * width), expert=True)
        self.w2 = parameter(experts, 4 * width, width, std=0.0, expert=True)

    def forward(self, x: Tensor) -> Tensor:
        """(E, R, D) -> (E, R, D)."""
        kernel = ChunkedFfn.apply if x.device.type == "cpu" else batched_ffn
        return kernel(x, self.w1, self.w2)


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
