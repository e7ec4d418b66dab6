"""GELU's Triton kernels: a block of one expert's numbers at a time, in fp32 whatever their type.

tanh(u) = 2 s - 1 with s the logistic function of 2 u, so GELU(x) = x (1 + tanh(u)) / 2 = x s.

Shapes: `E` experts, `size` numbers of each.
"""

import triton
import triton.language as tl

TWICE = tl.constexpr(2 * 0.7978845608028654)  # of the root of 2 / pi
CUBED = tl.constexpr(0.044715)


@triton.jit
def forward(x, out, size, x_stride, out_stride, BLOCK: tl.constexpr):  # (E, size), (E, size)
    """A program for a block of an expert."""
    expert = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    values = tl.load(x + expert * x_stride + at, mask=here, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp((values + values * values * values * CUBED) * -TWICE))
    tl.store(out + expert * out_stride + at, values * share, mask=here)


@triton.jit
def backward(
    grad, x, out,  # (E, size) each
    size, grad_stride, x_stride, out_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for a block of an expert."""
    expert = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    slope = tl.load(grad + expert * grad_stride + at, mask=here, other=0.0).to(tl.float32)
    values = tl.load(x + expert * x_stride + at, mask=here, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp((values + values * values * values * CUBED) * -TWICE))
    steepness = (values * values * (3 * CUBED) + 1) * TWICE
    tl.store(out + expert * out_stride + at, slope * share * (1 + values * (1 - share) * steepness), mask=here)
