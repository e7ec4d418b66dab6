"""Watches a running model, in sampling and in training: which experts took which tokens, and what the tokens read.

Both are context managers that hang forward hooks on a model and take them off again; a model that nobody watches has
none, so that watching costs nothing when it is off. While one is watched, no step is replayed as a graph.

Shapes: `B` images, `S` tokens of an image, `K` of them that masking kept, `L` text tokens, `H` query heads, `E`
experts, `N` tokens that this rank routes, `M` slots.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ecdit.model.attention import CrossAttention
from ecdit.model.dit import EcDit
from ecdit.model.router import Router, RoutingPlan
from parallel.graph import without_graphs


@dataclass(frozen=True)
class Routed:
    """What one MoE layer chose. layer: its number among the blocks, from 0. gates (N, E): the weight of each expert's
    result in the token's sum. taken (N, E): True where the expert took the token."""

    layer: int
    gates: Tensor
    taken: Tensor


@dataclass(frozen=True)
class Pass:
    """One forward pass of the model, or of this rank's stage of it. times (B,); keep (B, K), None where all tokens
    entered; one `Routed` a MoE layer with groups, in the order of the layers."""

    times: Tensor
    keep: Tensor | None
    layers: list[Routed] = field(default_factory=list)


@contextmanager
def watch_routing(model: EcDit, on_pass: Callable[[Pass], None]) -> Iterator[None]:
    """Calls `on_pass` after every forward pass of `model`, while the context is open.

    What backward computes again (`train.recompute`) is no pass of its own. On a rank that has a part of the model, the
    layers are those of its stage and the tokens those that it routes.
    """
    open_passes: list[Pass] = []

    def begin(_model: nn.Module, args: tuple, kwargs: dict) -> None:
        times = args[1] if len(args) > 1 else kwargs["t"]
        open_passes[:] = [Pass(times.detach(), kwargs.get("keep"))]  # one that an error cut short is forgotten

    def end(_model: nn.Module, _args: tuple, _output: object) -> None:
        on_pass(open_passes.pop())

    def routed(layer: int) -> Callable[[nn.Module, tuple, RoutingPlan], None]:
        def hook(_router: nn.Module, _args: tuple, plan: RoutingPlan) -> None:
            if open_passes:  # else backward is computing this layer again
                open_passes[-1].layers.append(_read(layer, plan))

        return hook

    hooks = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end),
        *(router.register_forward_hook(routed(layer)) for layer, router in _parts(model, Router)),
    ]
    try:
        with without_graphs():
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def watch_attention(model: EcDit, on_layer: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls `on_layer` with a block's number, from 0, and its cross-attention to the text (B, S, L), mean over the
    heads, in every forward pass while the context is open. For a model that is whole on this rank: it computes what
    the fused kernel keeps to itself."""

    def hook(layer: int) -> Callable[[nn.Module, tuple], None]:
        return lambda attention, args: on_layer(layer, _probabilities(attention, *args))

    hooks = [part.register_forward_pre_hook(hook(layer)) for layer, part in _parts(model, CrossAttention)]
    try:
        with without_graphs():
            yield
    finally:
        for handle in hooks:
            handle.remove()


def _parts(model: EcDit, kind: type[nn.Module]) -> list[tuple[int, nn.Module]]:
    """(number of the block, module) of each module of a kind."""
    return [(int(n), part) for n, block in model.blocks.items() for part in block.modules() if isinstance(part, kind)]


@torch.no_grad()
def _read(layer: int, plan: RoutingPlan) -> Routed:
    """A plan as the router made it, its slots still expert-major."""
    slots = len(plan.token)
    expert = torch.arange(plan.experts, device=plan.token.device).repeat_interleave(slots // plan.experts)
    filled = torch.ones_like(plan.token, dtype=torch.bool) if plan.filled is None else plan.filled
    place = plan.token * plan.experts + expert  # an empty slot's token is a stand-in, whose place it must not touch
    gates = plan.gate.detach().float() * filled
    flat = gates.new_zeros(plan.tokens * plan.experts)
    return Routed(
        layer,
        flat.index_add(0, place, gates).view(plan.tokens, plan.experts),
        flat.index_add(0, place, filled.float()).view(plan.tokens, plan.experts) > 0,
    )


@torch.no_grad()
def _probabilities(attention: CrossAttention, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Softmax of the scores, mean over the query heads: x (B, S, D), text (B, L, D), mask (B, 1, 1, L) -> (B, S, L)."""
    query = attention.query(x).unflatten(-1, (attention.kv_heads, -1, attention.head)).float()
    key = attention.key_value(text).unflatten(-1, (attention.kv_heads, 2, attention.head))[..., 0, :].float()
    scores = torch.einsum("bskrd,blkd->bskrl", query, key) * attention.head**-0.5
    return scores.masked_fill(~mask[:, :, :, None], -torch.inf).softmax(-1).mean((2, 3))
