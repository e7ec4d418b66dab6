"""The Triton kernel that widens FP8 rows. Shapes: `M` rows, `D` hidden."""

import triton
import triton.language as tl


@triton.jit
def widen(numbers, scale, out, D, BLOCK: tl.constexpr):  # (M, D), (M,), (M, D)
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(numbers + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + row * D + column, values * tl.load(scale + row), mask=column < D)
