"""Transformer Engine's linears, and its grouped products for experts. Importing this needs the extra `te` and a GPU.

Shapes: `i` inputs, `o` outputs, `e` experts, `R` rows of an expert, `D` their width, `F` their hidden width.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from torch import Tensor, nn

from parallel.layers import describe_linear
from parallel.precision import Fp8, outside_fp8

PROBE_ROWS = 128


class TransformerEngineLinears:
    """Transformer Engine's, which compute in FP8 where `fp8` says so."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool, fp8: Fp8):
        self.group, self.sequence, self.in_fp8 = group, sequence, "linears" in fp8.where

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
        linear.in_fp8 = self.in_fp8
        return describe_linear(linear, fan_in, fan_out, dim=dim, rank=self.group.rank(), std=std)


class Linear(te.Linear):
    """Leaves a region of FP8 where it is not to compute in it."""

    in_fp8 = False
    products, first_product, all_products = 1, 0, 1

    def forward(self, x: Tensor) -> Tensor:
        if self.in_fp8:
            return super().forward(x)
        with outside_fp8():
            return super().forward(x)

    def probe(self) -> float:
        """See `parallel.precision.Fp8Module`. Without its tensor ranks: another linear of its own shape."""
        o, i = self.weight.shape
        alone = te.Linear(i, o, bias=False, params_dtype=self.weight.dtype, device=self.weight.device)
        x = _random(PROBE_ROWS, i, like=self.weight)
        return _error(lambda: alone(x), lambda: x @ alone.weight.T, [x, alone.weight])

    def __str__(self) -> str:
        return f"a linear of {self.weight.shape[1]} to {self.weight.shape[0]}"


class GroupedFfn(nn.Module):
    """The experts of a rank, or of a chunk of them: two grouped products with an activation between them."""

    def __init__(
        self, width: int, hidden: int, activation: Callable[[Tensor], Tensor], first: int, count: int, of: int
    ):
        """Experts first ... first + count - 1 of all `of`."""
        super().__init__()
        self.up = GroupedProduct(count, width, hidden, first, of)
        self.down = GroupedProduct(count, hidden, width, first, of)
        self.activation = activation

    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """x (e, R, D), up (e, F, D), down (e, D, F) -> (e, R, D)."""
        hidden = self.activation(self.up(x.flatten(0, 1), up))
        return self.down(hidden, down).view(x.shape)


class GroupedProduct(te.GroupedLinear):
    """x_e W_e^T for every expert, by weights that stay stacked in one parameter elsewhere."""

    in_fp8 = True

    def __init__(self, count: int, fan_in: int, fan_out: int, first: int, of: int):
        super().__init__(count, fan_in, fan_out, bias=False, params_dtype=torch.bfloat16, device="meta")
        for number in range(count):  # neither its weights nor its biases are wanted
            del self._parameters[f"weight{number}"]
            setattr(self, f"bias{number}", torch.empty(0, dtype=torch.bfloat16, device="cuda"))
        self.products, self.first_product, self.all_products = count, first, of
        self._weights: list[Tensor] = []

    def _get_weight_tensors(self) -> list[Tensor]:
        return self._weights

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (e R, i), weight (e, o, i) -> (e R, o)."""
        self._weights = list(weight.unbind())
        try:
            splits = [len(x) // self.products] * self.products
            if self.in_fp8:
                return super().forward(x, splits)
            with outside_fp8():
                return super().forward(x, splits)
        finally:
            self._weights = []

    def probe(self) -> float:
        """See `parallel.precision.Fp8Module`."""
        alone = GroupedProduct(self.products, self.in_features, self.out_features, 0, self.products)
        x = _random(self.products * PROBE_ROWS, self.in_features, like=alone.bias0)
        weight = _random(self.products, self.out_features, self.in_features, like=alone.bias0)
        by_expert = (self.products, PROBE_ROWS, -1)
        return _error(lambda: alone(x, weight), lambda: (x.view(by_expert) @ weight.mT).flatten(0, 1), [x, weight])

    def __str__(self) -> str:
        return f"{self.products} experts' products of {self.in_features} to {self.out_features}"


def _random(*shape: int, like: Tensor) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device).requires_grad_()


def _error(ours: Callable[[], Tensor], plain: Callable[[], Tensor], inputs: list[Tensor]) -> float:
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
