"""The router's two steps: affinities in fp32, and each expert's choice of tokens.

Shapes: `N = G T` tokens, `D` hidden, `E` experts, `C` capacity, `G` routing groups, `T` tokens of a group.
"""

import torch
from torch import Tensor

from parallel import kernels
from parallel.kernels import operator, power_of_two

TOKENS = 64  # of a program of `affinities`
OTHERS = 32  # keys with which a program of `choose` compares its own at a time: one for each thread of a warp


def affinities(x: Tensor, weight: Tensor) -> Tensor:
    """softmax(x W) over experts (5), in fp32 at least, whatever the type of x. x (N, D), weight (D, E) -> (N, E).

    The kernel reads x as it is: products of bf16 numbers are exact in fp32, in which it adds them up.
    """
    if kernels.use_triton(x):
        return _Affinities.apply(x, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.softmax(x.to(wide) @ weight.to(wide), dim=-1)


def choose(affinity: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Each expert's top-C tokens of each group (6), best first, ties to the lower token; affinity (G, T, E).

    Returns the tokens, counted within the group (E, G, C), and their affinities, differentiable (E, G, C).
    """
    return _Choose.apply(affinity, capacity)


def top_tokens(affinity: Tensor, capacity: int) -> Tensor:
    """Indices of the `capacity` largest along the last dimension, (..., T) -> (..., C); ties to the lower index.

    torch.topk leaves the order of ties open. In fp32, affinities are not negative, so their bits order as they do:
    with the index in the low bits all keys differ, and topk routes alike on every device. Other types are sorted.
    """
    tokens = affinity.shape[-1]
    if affinity.dtype != torch.float32:
        return affinity.sort(dim=-1, descending=True, stable=True).indices[..., :capacity]
    backwards = torch.arange(tokens - 1, -1, -1, device=affinity.device)
    keys = (affinity.contiguous().view(torch.int32).long() << 32) | backwards
    return keys.topk(capacity, dim=-1).indices


class _Affinities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out = x.new_empty(len(x), weight.shape[1], dtype=torch.float32)
        _affinities(x, weight, out)
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, affinity = ctx.saved_tensors
        # of the products, in the type that every other linear has for its gradients
        slope = torch.ops.aten._softmax_backward_data(grad, affinity, -1, torch.float32).to(x.dtype)
        return slope @ weight.T, x.T @ slope


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, affinity: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        ctx.shape = affinity.shape
        groups, _, experts = ctx.shape
        if kernels.use_triton(affinity):
            gate = affinity.new_empty(experts, groups, capacity)
            chosen = torch.empty_like(gate, dtype=torch.int64)
            _choose(affinity.contiguous(), chosen, gate)
        else:
            by_expert = affinity.permute(2, 0, 1)  # (E, G, T)
            chosen = top_tokens(by_expert, capacity)
            gate = by_expert.gather(-1, chosen)
        ctx.save_for_backward(chosen)
        ctx.mark_non_differentiable(chosen)
        return chosen, gate

    @staticmethod
    def backward(ctx, _grad_chosen: None, grad: Tensor):
        grad_affinity = grad.new_zeros(ctx.shape)
        _give_back(ctx.saved_tensors[0], grad, grad_affinity)
        return grad_affinity, None


@operator("affinities(Tensor x, Tensor weight, Tensor(a!) out)")
def _affinities(x: Tensor, weight: Tensor, out: Tensor) -> None:
    from ecdit.model.kernels import router_triton

    (tokens, width), experts = x.shape, weight.shape[1]
    router_triton.affinities[(-(-tokens // TOKENS),)](
        x, weight, out, tokens, width, experts, TOKENS=TOKENS, BLOCK=64, EXPERTS=max(16, power_of_two(experts)),
        EXACT="ieee" if x.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip


@operator("give_back(Tensor token, Tensor grad, Tensor(a!) grad_affinity)")
def _give_back(token: Tensor, grad: Tensor, grad_affinity: Tensor) -> None:
    """An operator, for torch.compile must not look into it: on a CPU, torch 2.13 makes of zeros, a scatter into them
    and a softmax's backward pass one loop that gives other numbers."""
    # an expert takes a token once, so no two gradients go to the same place
    grad_affinity.permute(2, 0, 1).scatter_(-1, token, grad)


@operator("choose(Tensor affinity, Tensor(a!) token, Tensor(b!) gate)")
def _choose(affinity: Tensor, token: Tensor, gate: Tensor) -> None:
    from ecdit.model.kernels import router_triton

    (groups, tokens, experts), capacity = affinity.shape, gate.shape[-1]
    padded = power_of_two(tokens)
    warps = min(16, max(4, padded // 256))
    router_triton.choose[(experts, groups)](
        affinity, torch.empty_like(token), token, gate, tokens, experts, capacity,
        TOKENS=padded, BLOCK=16 * warps, OTHERS=OTHERS, num_warps=warps,
    )  # fmt: skip
