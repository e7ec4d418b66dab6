"""Runs a training step of the real model on the meta device, and writes down what it allocates, computes and sends.

Nothing is computed: a tensor on the meta device has a shape and no memory. Every kernel of the forward and backward
pass goes by, so a plan follows whatever the model's code does.

Shapes: `B` images of a micro-batch, `L` text tokens, `Y` text width.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ecdit.diffusion.draws import Draws
from ecdit.diffusion.objective import MicroBatch, objective, to_differentiate
from ecdit.model import experts
from ecdit.model.dit import EcDit
from ecdit.model.kernels import attention
from ecdit.recipe import Recipe
from launcher.plan.spread import Place, PlannedSpread, Sent
from parallel import kernels

TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ATEN = torch.ops.aten
PARTS = ("attention", "feed-forward", "experts", "routing", "rest")
OWNERS = {
    "SelfAttention": "attention",
    "CrossAttention": "attention",
    "Ffn": "feed-forward",
    "Experts": "experts",
    "Moe": "routing",
    "Router": "routing",
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
MASK_ALIGNMENT = 16  # of the kernel that takes a mask
VIEWS = ("view", "reshape", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze", "detach")
VIEWS += ("new_empty", "split", "chunk", "unbind", "alias", "as_strided", "unfold", "empty", "narrow", "mT")


@dataclass(frozen=True)
class Kernel:
    """One operation: floating-point operations of products, bytes read and written, and whose it is. product: whether
    a library's product of matrices."""

    part: str
    flops: float
    bytes: float
    product: bool


@dataclass
class Trace:
    """A micro-batch on one rank. Bytes: `peak` at most, `kept` when the forward pass ends, `dispatch` of what is kept
    that are rows of the experts' exchange. returned: elements of gradients that no product has added to their sum."""

    peak: float = 0.0
    kept: float = 0.0
    dispatch: float = 0.0
    returned: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    """Bytes alive, and every kernel."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace, self.live, self._known = trace, 0, {}
        self.part = "rest"
        self._bounds: list[tuple[int, str]] = []  # number of the first autograd node of a stretch, its part
        self._owner: dict[int, str] = {}
        self.of_part: Counter = Counter()

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """These were there before; views of them take nothing."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = 0

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What a module does, forward and, by its autograd nodes, backward."""
        before, self.part = self.part, part
        self._mark()
        try:
            yield
        finally:
            self.part = before
            self._mark()

    def _mark(self) -> None:
        self._bounds.append((torch._C._autograd._get_sequence_nr(), self.part))

    def _current(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.part
        number = node._sequence_nr()
        if number not in self._owner:
            part = "rest"
            for first, owner in self._bounds:
                if first > number:
                    break
                part = owner
            self._owner[number] = part
        return self._owner[number]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        outputs = list(_tensors(out))
        part = self._current()
        for tensor in outputs:
            self._hold(tensor, part)
        name = function._schema.name.removeprefix("aten::")
        if name != "t" and not name.startswith(VIEWS):
            # what is written to is among the outputs
            inputs = list(_tensors((args, {k: v for k, v in (kwargs or {}).items() if k != "out"})))
            touched = sum(_size(t) for t in (*inputs, *outputs))
            self.trace.kernels.append(Kernel(part, _flops(name, inputs, outputs), touched, name in PRODUCTS))
        return out

    def _hold(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = size
        self.live += size
        self.of_part[part] += size
        self.trace.peak = max(self.trace.peak, self.live)
        weakref.finalize(storage, self._free, key, part)

    def _free(self, key: int, part: str) -> None:
        size = self._known.pop(key, 0)
        self.live -= size
        self.of_part[part] -= size


def _fused_attention(device: str) -> Callable[..., Tensor]:
    """On the meta device torch would take the form of attention that keeps all scores; a device has a fused one."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_grouped: bool) -> Tensor:
        if device == "cpu":
            bias = None if attn_mask is None else torch.zeros_like(attn_mask, dtype=query.dtype)
            return ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=bias)[0]
        if attn_mask is None:
            return ATEN._scaled_dot_product_flash_attention(query, key, value)[0]
        length = attn_mask.shape[-1]
        aligned = -(-length // MASK_ALIGNMENT) * MASK_ALIGNMENT
        bias = query.new_empty(query.shape[0], 1, 1, aligned)[..., :length].expand(*query.shape[:3], length)
        return ATEN._scaled_dot_product_efficient_attention(query, key, value, bias, compute_log_sumexp=True)[0]

    return attend


def _by_flash(query: Tensor, mask: Tensor | None, device: str) -> bool:
    return device == "cuda" and query.dtype == torch.bfloat16 and mask is None


def trace(recipe: Recipe, place: Place, layers: int, tokens: int, device: str) -> Trace:
    """A micro-batch of a stage with `layers` blocks, each image with `tokens` tokens in the backbone.

    device: "cpu" or "cuda", whose kernels are meant.
    """
    found = Trace()
    sizes = recipe.parallel
    spread = PlannedSpread(
        place,
        found.sent.append,
        layers=layers,
        dispatch_chunks=sizes.dispatch_chunks,
        dispatch_fp8=sizes.dispatch_fp8,
    )
    kernel = experts.ChunkedFfn.apply if device == "cpu" else experts.batched_ffn
    fused = patch.object(F, "scaled_dot_product_attention", _fused_attention(device))
    triton = patch.object(kernels, "use_triton", lambda tensor: device == "cuda")
    takes = lambda query, _key, _value, mask: _by_flash(query, mask, device)  # noqa: E731
    grouped = patch.object(attention, "takes_grouped_queries", takes)
    with torch.device("meta"), patch.object(experts, "batched_ffn", kernel), fused, triton, grouped:
        model = EcDit(recipe.model, 0, spread, recipe.train.recompute).to(TYPES[recipe.train.precision])
        batch, hidden = _inputs(recipe, model, spread, tokens)
        watch = _Watch(found)
        watch.leave_out([*model.parameters(), *model.buffers(), *(() if hidden is None else (hidden,))])
        watch.leave_out(t for t in vars(batch).values() if isinstance(t, Tensor))
        watch.leave_out(t for t in vars(batch.draws).values() if isinstance(t, Tensor))
        _label(model, watch)
        for weight in model.parameters():
            # as DDP does, which adds it to its own buffer
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
            weight.grad_added_to_main_grad = False
            if recipe.engine == "megatron":
                # fp32 in truth; products of two types have no meta form, and their time is that of their arithmetic
                weight.main_grad = torch.empty_like(weight, requires_grad=False)
                watch.leave_out([weight.main_grad])
        with watch:
            value = _forward(model, batch, recipe, hidden)
            found.kept, found.dispatch = watch.live, watch.of_part["routing"] + watch.of_part["experts"]
            value.backward(torch.empty_like(value))
    found.returned = sum(weight.numel() for weight in model.parameters() if not weight.grad_added_to_main_grad)
    return found


def _forward(model: EcDit, batch: MicroBatch, recipe: Recipe, hidden: Tensor | None) -> Tensor:
    per_image, extra, out = objective(model, batch, recipe, hidden)
    return to_differentiate(per_image, extra, out, len(batch.latents), recipe.train.batch)[0]


def _inputs(recipe: Recipe, model: EcDit, spread: PlannedSpread, tokens: int) -> tuple[MicroBatch, Tensor | None]:
    shape, images = recipe.model, recipe.train.micro_batch
    latents = torch.empty(images, shape.channels, shape.side, shape.side)
    keep = torch.empty(images, tokens, dtype=torch.int64) if tokens < shape.tokens else None
    draws = Draws(torch.empty_like(latents), torch.empty(images), keep)
    text = torch.empty(images, shape.text_tokens, shape.text_width)
    mask = torch.empty(images, shape.text_tokens, dtype=torch.bool)
    hidden = None
    if not spread.first_stage:
        dtype = TYPES[recipe.train.precision]
        hidden = torch.empty(model.hidden_shape(images, tokens), dtype=dtype).requires_grad_()
    return MicroBatch(latents, text, mask, draws), hidden


def _label(model: nn.Module, watch: _Watch) -> None:
    """Has every module of a part say when it is at work."""
    for module in model.modules():
        part = OWNERS.get(type(module).__name__)
        if part is not None:
            forward = module.forward

            def labelled(*args, _forward=forward, _part=part, **kwargs):
                with watch.within(_part):
                    return _forward(*args, **kwargs)

            module.forward = labelled


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))


def _size(tensor: Tensor) -> int:
    """Bytes that a kernel moves of it: a broadcast dimension is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def _flops(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    if name in PRODUCTS:
        left = inputs[-2]
        return 2.0 * outputs[0].numel() * left.shape[-1]
    if name in ("ecdit::attend", "ecdit::attend_backward"):  # backward makes the scores again
        (log_sum,) = (x for x in inputs if x.dtype == torch.float32)
        products = 10.0 if name.endswith("backward") else 4.0
        return products * log_sum.numel() * inputs[0].shape[-1] * inputs[1].shape[1]
    if name.startswith("_scaled_dot_product"):
        backward = "backward" in name
        query, key = (inputs[1], inputs[2]) if backward else (inputs[0], inputs[1])
        return (10.0 if backward else 4.0) * query.numel() * key.shape[-2]
    return 0.0
