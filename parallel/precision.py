"""FP8 through Transformer Engine: which modules compute in it, whether they can here, and what of it is saved.

Shapes: `n` products of a module (1 of a linear, one for each expert of a group of them), `H` steps of history.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn

from parallel.checkpoint.boxes import Boxes

KINDS = ("delayed", "current", "block")
HISTORY = 16  # forward passes that a delayed scale looks back; of weights' maxima, kept ones have none
# in a module's name, what is a layout's and not the model's: a chunk of experts, a dense layer by itself
WITHIN = re.compile(r"\.ffns\.\d+|(?<=\.ffn)\.whole")
WORST = 0.15  # relative error of a product of random numbers in FP8 that is no longer one of rounding


class Fp8Module(Protocol):
    """A library's module whose products may be in FP8. `in_fp8`: whether they are. Its products are number
    `first_product` and on, of `all_products` of the layer: one for each expert. `same_products`: the ranks that have
    them too, over which maxima of delayed scaling are taken; None: all ranks."""

    in_fp8: bool
    same_products: dist.ProcessGroup | None
    products: int
    first_product: int
    all_products: int

    def probe(self) -> float:
        """Relative error of the products of another module like it on random numbers, forward and backward; raises
        what the library raises."""


class Fp8:
    """How a model computes in FP8. `kind`: of scaling, one of KINDS or "none"; `where`: of "experts", "linears".
    `frozen`: its weights no longer change, so outside of training, too, they are cast once."""

    def __init__(self, kind: str = "none", where: Collection[str] = ()):
        self.kind, self.where = kind, frozenset(where if kind != "none" else ())
        self.frozen = False
        self.weights = 0  # how often they have changed
        self._recipe = None

    def region(self, same_products: dist.ProcessGroup | None = None) -> AbstractContextManager:
        """Around a model's forward pass: modules that can compute in FP8 do. Around a module's making: the ranks over
        which its maxima are taken."""
        if not self.where:
            return nullcontext()
        import transformer_engine.pytorch as te

        self._recipe = self._recipe or self._make_recipe()
        return te.autocast(enabled=True, recipe=self._recipe, amax_reduction_group=same_products)

    def weights_changed(self) -> None:
        """To be called when they have: what was cast of them is then cast anew (`Kept`)."""
        self.weights += 1

    def recompute_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Of a forward pass within the region, and of its repetition by the backward pass, which is not."""
        return nullcontext(), self.region()

    def _make_recipe(self):
        from transformer_engine.common import recipe

        return {
            "delayed": lambda: recipe.DelayedScaling(amax_history_len=HISTORY, amax_compute_algo="max"),
            "current": recipe.Float8CurrentScaling,
            "block": recipe.Float8BlockScaling,
        }[self.kind]()

    def missing(self) -> str | None:
        """Why this machine cannot compute so at all, or None."""
        import transformer_engine.pytorch as te

        asked = te.is_fp8_block_scaling_available if self.kind == "block" else te.is_fp8_available
        available, why = asked(return_reason=True)
        return None if available else why

    def prepare(self, model: nn.Module) -> list[str]:
        """Tries every shape that the model has. Those that fail compute in the model's own type from now on; a message
        for each of them. Afterwards the states of FP8 are there."""
        if not self.where:
            return []
        messages: dict[str, str] = {}
        tried: dict[str, str | None] = {}
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        for _, module in list(fp8_modules(model)):
            shape = str(module)
            if shape not in tried:
                tried[shape] = self._try(module)
            if tried[shape] is not None:
                module.in_fp8 = False
                messages[shape] = f"precision.fp8: {self.kind} is left out for {shape}: {tried[shape]}"
        FP8GlobalStateManager.reset()  # it would go on to scale what was tried
        for _, module in fp8_modules(model):
            with self.region(module.same_products):
                module.init_fp8_metadata(num_gemms=module.products)
        return list(messages.values())

    def _try(self, module: Fp8Module) -> str | None:
        try:
            with self.region():
                error = module.probe()
        except Exception as failed:  # the library's errors are of many kinds; each means that it cannot
            return str(failed).splitlines()[0]
        return None if error <= WORST else f"its error is {error:.1%}"


class Kept:
    """Whether a module still has its weights in FP8 from an earlier micro-batch of the step, or an earlier picture."""

    def __init__(self, fp8: Fp8):
        self._fp8, self._weights = fp8, -1

    def at_all(self, training: bool) -> bool:
        """Whether they are kept. While a model is evaluated in training, its averaged weights stand in for them."""
        return training or self._fp8.frozen

    def stale(self) -> bool:
        """Whether they are to be cast now. Who asks has to do it."""
        stale, self._weights = self._weights != self._fp8.weights, self._fp8.weights
        return stale


def outside_fp8() -> AbstractContextManager:
    """Within a region: not in FP8."""
    import transformer_engine.pytorch as te

    return te.autocast(enabled=False)


def fp8_modules(model: nn.Module) -> Iterator[tuple[str, Fp8Module]]:
    """Modules that compute in FP8, by name."""
    for name, module in model.named_modules():
        if getattr(module, "in_fp8", False):
            yield name, module


def fp8_states(model: nn.Module) -> dict[str, Boxes]:
    """Scales and histories of delayed scaling, as "fp8/module.direction.what", over all experts: views."""
    found: dict[str, list[tuple[tuple[int, ...], Tensor]]] = {}
    wholes: dict[str, tuple[int, ...]] = {}
    for name, module in fp8_modules(model):
        for direction in ("scaling_fwd", "scaling_bwd"):
            state = module.fp8_meta.get(direction)
            if getattr(state, "amax_history", None) is None:
                continue
            scale = state.scale.view(module.products, -1)  # (n, tensors of a product)
            history = state.amax_history.view(len(state.amax_history), *scale.shape)  # (H, n, ...)
            for what, values, dim in (("scale", scale, 0), ("history", history, 1)):
                key = f"fp8/{WITHIN.sub('', name)}.{direction}.{what}"
                offset = [0] * values.ndim
                offset[dim] = module.first_product
                whole = list(values.shape)
                whole[dim] = module.all_products
                found.setdefault(key, []).append((tuple(offset), values))
                wholes[key] = tuple(whole)
    return {key: Boxes(wholes[key], parts) for key, parts in found.items()}
