"""The experts in FP8: Transformer Engine's grouped products and casts, with the GELU inside of the casts.

Importing this needs the extra `te` and a GPU. GroupedLinear, twice with an activation between, would write the hidden
rows as bf16 once more each way, and copy every expert's gradient to its place in the stacked weight's.

Shapes: `e` experts, `R` rows of an expert, `D` their width, `F` their hidden width.
"""

from contextlib import ExitStack

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
import transformer_engine_torch as tex
from torch import Tensor, nn
from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.quantized_tensor import Quantizer, prepare_for_saving, restore_from_saved

from parallel.layers.transformer_engine import PROBE_ROWS, random_input, relative_error
from parallel.precision import Fp8, Kept
from parallel.spread import ExpertFfn
from parallel.weight_gradients import handed_over, share_kept, sum_of


class GroupedFfn(nn.Module):
    """The experts of a rank, or of a chunk of them. `plain` computes the same in the model's own type."""

    def __init__(
        self,
        fp8: Fp8,
        width: int,
        hidden: int,
        plain: ExpertFfn,
        first: int,
        count: int,
        of: int,
        same: dist.ProcessGroup | None = None,
    ):
        """Experts first ... first + count - 1 of all `of`. same: ranks that have these, too (`Fp8Module`)."""
        super().__init__()
        self.fp8, self.plain, self.shape, self.same = fp8, plain, (width, hidden, count), same
        self.up = GroupedProduct(self, count, width, hidden, first, of)
        self.down = GroupedProduct(self, count, hidden, width, first, of)

    def forward(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """x (e, R, D), up (e, F, D), down (e, D, F), of a single expert also (F, D) and (D, F) -> (e, R, D)."""
        if not (self.up.in_fp8 and self.down.in_fp8 and FP8GlobalStateManager.is_fp8_enabled()):
            return self.plain(x, *(w if w.ndim == 3 else w[None] for w in (up, down)))
        rows = x.flatten(0, 1)
        # autograd's functions do not tell: what asks for gradients does so under no_grad, too
        training = torch.is_grad_enabled() and any(y.requires_grad for y in (x, up, down))
        with ExitStack() as begun:
            for product in (self.up, self.down):  # as each would begin alone: scales and their histories
                begun.enter_context(product.prepare_forward(rows, num_gemms=product.products))
            return _Fp8Ffn.apply(rows, up, down, _Casts(self.up), _Casts(self.down), training).view(x.shape)

    def probe(self) -> float:
        """Relative error of other experts of these shapes, on random numbers, forward and backward."""
        width, hidden, count = self.shape
        alone = GroupedFfn(self.fp8, width, hidden, self.plain, 0, count, count)
        like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
        # of a size at which the hidden rows are about 1, as in training: the slope of GELU then changes little where
        # they are off by the rounding of FP8
        inputs = [
            random_input(count, PROBE_ROWS, width, like=like),
            random_input(count, hidden, width, like=like, std=width**-0.5),
            random_input(count, width, hidden, like=like, std=hidden**-0.5),
        ]

        def ours() -> Tensor:
            self.fp8.weights_changed()  # by a scale that knows more
            return alone(*inputs)

        return relative_error(ours, lambda: self.plain(*inputs), inputs)

    def __str__(self) -> str:
        width, hidden, count = self.shape
        return f"{count} experts of {width} by {hidden}"


class GroupedProduct(te.GroupedLinear):
    """One of the two products of all experts: what Transformer Engine keeps of it, but for the weights, which it has in
    FP8 from a step's first micro-batch on."""

    in_fp8 = True

    def __init__(self, ffn: GroupedFfn, count: int, fan_in: int, fan_out: int, first: int, of: int):
        super().__init__(count, fan_in, fan_out, bias=False, params_dtype=torch.bfloat16, device="meta")
        for number in range(count):
            del self._parameters[f"weight{number}"]
        self.products, self.first_product, self.all_products = count, first, of
        self.same_products = ffn.same
        self.kept, self.weights = Kept(ffn.fp8), []
        self._ffn = (ffn,)  # in a tuple: the module that this is a part of is none of its own

    def probe(self) -> float:
        """See `parallel.precision.Fp8Module`: both products together, as they are used."""
        return self._ffn[0].probe()

    def __str__(self) -> str:
        return str(self._ffn[0])


class _Casts:
    """A product's quantizers, one an expert, and how exact its sums are to be."""

    def __init__(self, product: GroupedProduct):
        self._product = product
        self.inputs, self._weights, *_, self.gradients = product._get_quantizers()
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        # Transformer Engine's own choice where a recipe says nothing: exact sums for gradients alone
        self.exact = {
            kind: getattr(getattr(recipe, f"fp8_gemm_{kind}", None), "use_split_accumulator", kind != "fprop")
            for kind in ("fprop", "dgrad", "wgrad")
        }

    def for_backward(self, training: bool) -> None:
        """Whether a backward pass will read what is cast in the forward pass, which it does along the columns."""
        for quantizer in (*self.inputs, *self._weights):
            quantizer.set_usage(rowwise=True, columnwise=training)

    def of_weights(self, weights: Tensor, training: bool) -> list:
        """Of weights (e, o, i) or (o, i). Those that are kept are for what follows, too (`Kept`)."""
        weights, product = weights.view(len(self._weights), *weights.shape[-2:]), self._product
        if not product.kept.at_all(training):
            return [cast(w) for cast, w in zip(self._weights, weights, strict=True)]
        if product.kept.stale():
            product.weights = []  # frees them first
            for cast in self._weights:
                cast.internal = False  # saving for the backward pass empties what is internal
            product.weights = [cast(w) for cast, w in zip(self._weights, weights, strict=True)]
        return product.weights


class _Fp8Ffn(torch.autograd.Function):
    """GELU(x_e up_e^T) down_e^T for all experts. x (e R, D), up and down as `GroupedFfn` has them -> (e R, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, first: _Casts, second: _Casts, training: bool) -> Tensor:
        for casts in (first, second):
            casts.for_backward(training)
        count, inner = len(first.inputs), up.shape[-2]
        ctx.weights, ctx.splits = (up, down), [len(x) // count] * count
        splits = ctx.splits
        rows = tex.split_quantize(x, splits, first.inputs)
        up, down = first.of_weights(up, training), second.of_weights(down, training)
        hidden = _rows_product(up, rows, first, "fprop", splits, x, inner)
        active = [tex.gelu(part, cast) for part, cast in zip(hidden.split(splits), second.inputs, strict=True)]
        out = _rows_product(down, active, second, "fprop", splits, x, x.shape[1])
        if training:
            for part in (*rows, *active):
                part.update_usage(rowwise_usage=False, columnwise_usage=True)
            saved, ctx.parts = prepare_for_saving(*rows, *active, *up, *down)
            ctx.save_for_backward(hidden, *saved)
            ctx.casts = first, second
            ctx.first_of_all = FP8GlobalStateManager.is_first_fp8_module()
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        (first, second), (up_weight, down_weight), splits = ctx.casts, ctx.weights, ctx.splits
        hidden, *saved = ctx.saved_tensors
        parts = restore_from_saved(ctx.parts, saved)
        count = len(splits)
        rows, active, up, down = (parts[at : at + count] for at in range(0, 4 * count, count))
        grad = grad.contiguous()
        width, inner = grad.shape[1], hidden.shape[1]
        slopes = tex.split_quantize(grad, splits, second.gradients)
        grad_active = _rows_product(down, slopes, second, "dgrad", splits, grad, inner)
        grad_down = _weights_product(active, slopes, second, splits, down_weight)
        slopes = [
            tex.dgelu(by_active, part, cast)
            for by_active, part, cast in zip(
                grad_active.split(splits), hidden.split(splits), first.gradients, strict=True
            )
        ]
        grad_x = _rows_product(up, slopes, first, "dgrad", splits, grad, width)
        grad_up = _weights_product(rows, slopes, first, splits, up_weight)
        if ctx.first_of_all:  # the last one of the backward pass: delayed scales are brought up to date
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return grad_x, grad_up, grad_down, None, None, None


def _rows_product(
    weights: list, rows: list, casts: _Casts, kind: str, splits: list[int], like: Tensor, width: int
) -> Tensor:
    """Rows times weights, transposed forward: (e R, width)."""
    out = like.new_empty(sum(splits), width)
    if kind == "dgrad":
        for weight in weights:
            weight.update_usage(columnwise_usage=True)
    _grouped(weights, rows, [out], casts, kind, "TN" if kind == "fprop" else "NN", splits, single_output=True)
    return out


def _weights_product(rows: list, slopes: list, casts: _Casts, splits: list[int], weight: Tensor) -> Tensor:
    """To be returned as the gradient of the stacked weights: each expert's is written to its place in it, or added to
    it in the weight's sum (`weight_gradients.py`)."""
    total = sum_of(weight)
    out = torch.empty_like(weight) if total is None else total
    places = list(out.view(len(splits), *weight.shape[-2:]).unbind())
    add = total is not None and share_kept(weight) > 0
    _grouped(rows, slopes, places, casts, "wgrad", "NT", splits, accumulate=add)
    return out if total is None else handed_over(weight)


def _grouped(
    a: list, b: list, out: list[Tensor], casts: _Casts, kind: str, layout: str, splits: list[int], **options
) -> None:
    nothing: list[Quantizer | None] = [None] * len(splits)
    general_grouped_gemm(
        a,
        b,
        out,
        nothing,
        out[0].dtype,
        layout=layout,
        m_splits=splits,
        grad=kind != "fprop",
        use_split_accumulator=casts.exact[kind],
        **options,
    )
