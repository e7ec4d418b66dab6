"""What people would use instead, and what benchmarks share: Algorithm 1 as printed, a block in plain torch.

Shapes: `G` routing groups, `T` tokens of a group, `B` images, `S` tokens of an image, `L` text tokens, `D` hidden,
`F = 4D` expert hidden, `E` experts, `C` capacity.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.budget import Step
from ecdit import reference
from ecdit.model.layers import gelu
from parallel.precision import KINDS, Fp8
from parallel.spread import Spread
from parallel.spread.ranks import RankSpread
from parallel.topology import Layout, Topology
from parallel.topology import start as start_ranks

GPU = torch.cuda.is_available()
FP8_KINDS = KINDS if GPU else ()
STD = 0.02  # of weights that start as zeros: products of zeros take less power, and so less time


def algorithm_1(x: Tensor, w_router: Tensor, w1: Tensor, w2: Tensor, capacity: int) -> Tensor:
    """The routing layer as the paper's Algorithm 1 has it: one-hot dispatch and combine by einsum.

    x (G, T, D), w_router (D, E), w1 (E, D, F), w2 (E, F, D) -> (G, T, D).
    """
    affinity = torch.einsum("gtd,de->gte", x, w_router).softmax(-1)
    gates, index = affinity.transpose(1, 2).topk(capacity, dim=-1)  # (G, E, C)
    one_hot = F.one_hot(index, x.shape[1]).to(x.dtype)  # (G, E, C, T)
    taken = torch.einsum("gect,gtd->gecd", one_hot, x)
    computed = torch.stack([gelu(taken[:, e] @ w1[e]) @ w2[e] for e in range(len(w1))], dim=1)
    return torch.einsum("gect,gec,gecd->gtd", one_hot, gates, computed)


class PlainBlock(reference.Block):
    """The oracle's block with torch's own fused attention, and Algorithm 1 for its MoE layer: a block as one writes it.

    Its weights are named as those of `ecdit.model.block.Block`.
    """

    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, group_tokens: int) -> Tensor:
        """x (B, S, D), time (B, D), text (B, L, D), mask (B, 1, 1, L) -> (B, S, D)."""
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(time)).chunk(4, dim=-1)
        own, cross = self.self_attention, self.cross_attention
        qkv = own.qkv(reference.modulate(x, shift1, scale1)).unflatten(-1, (own.kv_heads, -1, own.head))
        x = x + own.out(_attend(qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]))
        query = cross.query(x).unflatten(-1, (cross.kv_heads, -1, cross.head))
        key, value = cross.key_value(text).unflatten(-1, (cross.kv_heads, 2, cross.head)).unbind(-2)
        x = x + cross.out(_attend(query, key, value, mask))
        h = reference.modulate(x, shift2, scale2)
        return x + (self._moe(h, group_tokens) if self.sparse else self.ffn(h)[0])

    def _moe(self, h: Tensor, group_tokens: int) -> Tensor:
        groups, config, experts = h.reshape(-1, group_tokens, h.shape[-1]), self.moe.config, self.moe.experts
        capacity = int(group_tokens * config.capacity_factor / config.experts)
        return algorithm_1(groups, self.moe.router.weight, experts.up.mT, experts.down.mT, capacity).view_as(h)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """query (B, S, KV, R, d), key and value (B, L, KV, d), mask (B, 1, 1, L) -> (B, S, KV R d)."""
    key, value = (x.repeat_interleave(query.shape[3], dim=2).transpose(1, 2) for x in (key, value))
    out = F.scaled_dot_product_attention(query.flatten(2, 3).transpose(1, 2), key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def differentiated(function: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor]) -> Step:
    """A forward and a backward pass, with the gradients of the inputs and the weights."""
    inputs = [x.requires_grad_() for x in inputs]
    slope = torch.randn_like(
        function(*inputs).detach()
    )  # with gradients: torch.compile would compile once more without

    def step() -> None:
        torch.autograd.grad(function(*inputs), [*inputs, *weights], slope, allow_unused=True)

    return step


@torch.no_grad()
def randomized(module: nn.Module) -> nn.Module:
    """Its weights from normals."""
    for weight in module.parameters():
        weight.normal_(std=STD)
    return module


def here() -> Topology:
    """All ranks of this job as data ranks, or this process alone."""
    return start_ranks(Layout(), timeout_minutes=10.0)


def first_region(fp8: Fp8) -> AbstractContextManager:
    """Around a forward pass as of a step's first micro-batch, which casts the weights."""
    fp8.weights_changed()
    return fp8.region()


@contextmanager
def in_fp8(kind: str, build: Callable[[Spread], nn.Module]) -> Iterator[tuple[nn.Module, Fp8]]:
    """A module whose products are in FP8. Raises RuntimeError where this machine, or the library, cannot."""
    fp8 = Fp8(kind, ("experts", "linears"))
    why = fp8.missing()
    if why is not None:
        raise RuntimeError(why)
    module = build(RankSpread(here(), fp8=fp8))
    messages = fp8.prepare(module)
    if messages:
        raise RuntimeError("; ".join(messages))
    yield module, fp8
