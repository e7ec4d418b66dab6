"""AdaLN's Triton kernels: a row at a time, in fp32 whatever its type.

Shapes: `B` images, `S` tokens of an image, `D` hidden, `P` parts of an image, ROWS tokens each.
"""

import triton
import triton.language as tl


@triton.jit
def forward(
    x, shift, scale, out, mean, inverse,  # (B, S, D), (B, D), (B, D), (B, S, D), (B, S), (B, S)
    S, D, shift_stride, scale_stride, epsilon, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64)
    image = row // S
    column = tl.arange(0, BLOCK)
    here = column < D
    values = tl.load(x + row * D + column, mask=here, other=0.0).to(tl.float32)
    average = tl.sum(values, 0) / D
    centred = tl.where(here, values - average, 0.0)
    deviation = tl.rsqrt(tl.sum(centred * centred, 0) / D + epsilon)
    factor = 1 + tl.load(scale + image * scale_stride + column, mask=here, other=0.0).to(tl.float32)
    term = tl.load(shift + image * shift_stride + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, centred * deviation * factor + term, mask=here)
    tl.store(mean + row, average)
    tl.store(inverse + row, deviation)


@triton.jit
def backward(
    grad, x, scale, mean, inverse,  # (B, S, D), (B, S, D), (B, D), (B, S), (B, S)
    grad_x, shift_sums, scale_sums,  # (B, S, D), (B, P, D), (B, P, D)
    S, D, scale_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each part of an image. With n the normalised row and g = grad (1 + scale):
    grad_x = (g - mean(g) - n mean(g n)) inverse."""
    image, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    here = column < D
    factor = 1 + tl.load(scale + image * scale_stride + column, mask=here, other=0.0).to(tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    for token in range(part * ROWS, tl.minimum(part * ROWS + ROWS, S)):
        row = image * S + token
        slope = tl.load(grad + row * D + column, mask=here, other=0.0).to(tl.float32)
        values = tl.load(x + row * D + column, mask=here, other=0.0).to(tl.float32)
        deviation = tl.load(inverse + row)
        normal = tl.where(here, (values - tl.load(mean + row)) * deviation, 0.0)
        g = slope * factor
        along = tl.sum(g * normal, 0) / D
        tl.store(grad_x + row * D + column, (g - tl.sum(g, 0) / D - normal * along) * deviation, mask=here)
        shift_sum += slope
        scale_sum += slope * normal
    at = (image * tl.num_programs(1) + part) * D + column
    tl.store(shift_sums + at, shift_sum, mask=here)
    tl.store(scale_sums + at, scale_sum, mask=here)
