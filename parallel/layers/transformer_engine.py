"""Transformer Engine's linears. Importing this needs the extra `te` and a GPU.

Shapes: `i` inputs, `o` outputs.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from torch import Tensor, nn

from parallel.layers import describe_linear
from parallel.precision import Fp8, Kept, outside_fp8
from parallel.weight_gradients import sum_of

PROBE_ROWS = 128


class TransformerEngineLinears:
    """Transformer Engine's, which compute in FP8 where `fp8` says so. sums: whether products may add weight gradients
    to their sums. Under recomputation they may not: the library then has another tensor than the weight, and DDP's hook
    gets no gradient."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool, fp8: Fp8, sums: bool):
        self.group, self.sequence, self.fp8, self.in_fp8 = group, sequence, fp8, "linears" in fp8.where
        self.sums = sums

    def column(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        return self._make(fan_in, fan_out, "column", 0, std)

    def row(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        return self._make(fan_in, fan_out, "row", 1, std)

    def _make(self, fan_in: int, fan_out: int, mode: str, dim: int, std: float | None) -> nn.Module:
        size = self.group.size()
        linear = Linear(
            fan_in,
            fan_out,
            bias=False,
            tp_group=self.group,
            tp_size=size,
            sequence_parallel=self.sequence,
            parallel_mode=mode if size > 1 else None,
            params_dtype=torch.float32,
            device=torch.empty(0).device,  # the context's, as for every other parameter
        )
        linear.in_fp8, linear.kept, linear.sums = self.in_fp8, Kept(self.fp8), self.sums
        return describe_linear(linear, fan_in, fan_out, dim=dim, rank=self.group.rank(), std=std)


class Linear(te.Linear):
    """Leaves a region of FP8 where it is not to compute in it. In training its weights are cast once a step, and their
    gradients added to their sum, where the engine has one, within the product."""

    in_fp8 = False
    products, first_product, all_products = 1, 0, 1
    same_products = None

    def forward(self, x: Tensor) -> Tensor:
        self.fuse_wgrad_accumulation = self.sums and sum_of(self.weight) is not None
        if self.in_fp8:
            training = torch.is_grad_enabled() and x.requires_grad
            return super().forward(x, is_first_microbatch=self.kept.stale() if self.kept.at_all(training) else None)
        with outside_fp8():
            return super().forward(x)

    def probe(self) -> float:
        """See `parallel.precision.Fp8Module`. Without its tensor ranks: another linear of its own shape."""
        o, i = self.weight.shape
        alone = te.Linear(i, o, bias=False, params_dtype=self.weight.dtype, device=self.weight.device)
        x = random_input(PROBE_ROWS, i, like=self.weight)
        return relative_error(lambda: alone(x), lambda: x @ alone.weight.T, [x, alone.weight])

    def __str__(self) -> str:
        return f"a linear of {self.weight.shape[1]} to {self.weight.shape[0]}"


def random_input(*shape: int, like: Tensor, std: float = 1.0) -> Tensor:
    return (std * torch.randn(shape, dtype=like.dtype, device=like.device)).requires_grad_()


def relative_error(ours: Callable[[], Tensor], plain: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    """Largest relative difference of the results and of the inputs' gradients, at the second of two calls: a delayed
    scale knows nothing at the first."""
    with torch.enable_grad():
        expected = plain()
        slope = torch.randn_like(expected)
        theirs = [expected, *torch.autograd.grad(expected, inputs, slope)]
        for _ in range(2):
            out = ours()
            found = [out, *torch.autograd.grad(out, inputs, slope)]
    return max(((a - b).float().norm() / b.float().norm()).item() for a, b in zip(found, theirs, strict=True))
