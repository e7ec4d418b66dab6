"""The expert-choice layer against a dense FFN of equal FLOPs and against Algorithm 1 as the paper prints it.

Shapes: `G` routing groups, `T` tokens of a group, `D` hidden, `F = 4D` expert hidden, `E` experts, `C` capacity.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, compare
from ecdit.model.experts import Ffn
from ecdit.model.layers import gelu
from ecdit.model.moe import Moe
from parallel.spread import Spread

G, T, D = 8, 1024, 256
CAPACITY_FACTOR = 2
EXPERTS = (16, 64)
ROUNDS = 7


def rows() -> list[Row]:
    """Forward and backward, gradients of weights and tokens, fp32, on this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: list[Row] = []
    for experts in EXPERTS:
        with device:
            functions, against = _functions(experts)
        found += compare(functions, against, ROUNDS)
    return found


def _functions(experts: int) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    moe = _normal(Moe(D, experts, CAPACITY_FACTOR, "expert_choice", Spread()))
    ffn = _normal(Ffn(D, Spread()))
    tokens = torch.randn(G, T, D)
    equal_flops = torch.randn(CAPACITY_FACTOR * G * T, D)
    weights = (moe.router.weight, moe.experts.up, moe.experts.down)
    layer, dense, printed = (
        f"{name}, E {experts}" for name in ("EC-DiT layer", "dense FFN of equal FLOPs", "Algorithm 1 as printed")
    )
    router, up, down = weights
    capacity = T * CAPACITY_FACTOR // experts
    functions = {
        dense: _step(lambda x: ffn(x), equal_flops, list(ffn.parameters())),
        layer: _step(lambda x: moe(x, T)[0], tokens, list(weights)),
        printed: _step(lambda x: algorithm_1(x, router, up.mT, down.mT, capacity), tokens, list(weights)),
    }
    return functions, {layer: dense, printed: layer}


def algorithm_1(x: Tensor, w_router: Tensor, w1: Tensor, w2: Tensor, capacity: int) -> Tensor:
    """The routing layer as the paper's Algorithm 1 has it: one-hot dispatch and combine by einsum.

    x (G, T, D), w_router (D, E), w1 (E, D, F), w2 (E, F, D) -> (G, T, D).
    """
    affinity = torch.einsum("gtd,de->gte", x, w_router).softmax(-1)
    gates, index = affinity.transpose(1, 2).topk(capacity, dim=-1)  # (G, E, C)
    one_hot = nn.functional.one_hot(index, x.shape[1]).to(x.dtype)  # (G, E, C, T)
    taken = torch.einsum("gect,gtd->gecd", one_hot, x)
    computed = torch.stack([gelu(taken[:, e] @ w1[e]) @ w2[e] for e in range(len(w1))], dim=1)
    return torch.einsum("gect,gec,gecd->gtd", one_hot, gates, computed)


def _step(layer: Callable[[Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> Callable[[], None]:
    x = x.requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(layer(x), [x, *weights], grad)

    return step


def _normal(module: nn.Module) -> nn.Module:
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.05)
    return module
