"""EC-DiT in one file of plain PyTorch: the oracle that every fast, sharded or fused path must match.

A transcription of Sun et al. 2024 (arXiv 2410.02098); (n) is the paper's equation. Nothing here is optimised and
nothing is shared with the rest of the project, so that a mistake cannot be made twice.

Shapes: `B` images, `S` tokens of an image, `K` tokens kept by masking, `L` text tokens, `D` hidden, `F = 4D` expert
hidden, `E` experts, `C` capacity, `G` routing groups, `T` tokens of a group, `H`/`KV` query/key-value heads, `Y` width
of the text embedding, `c` latent channels, `P = patch * patch * c` numbers in a patch.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """What decides the network. `routing` is dense, expert_choice or token_choice; `sparse_layers` every_second or all;
    `router_input` modulated or unmodulated."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    routing: str = "expert_choice"
    experts: int = 8
    capacity_factor: float = 2.0
    side: int = 32
    channels: int = 4
    patch: int = 2
    text_width: int = 2048
    sparse_layers: str = "every_second"
    router_input: str = "modulated"


# ---------------------------------------------------------------------------------------------- rectified flow (1)


def flow_pair(x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy sample and velocity target, from noise at t = 0 to data at t = 1. x, eps (B, c, h, w); t (B,)."""
    t = t.view(-1, 1, 1, 1)
    return t * x + (1 - t) * eps, x - eps


def flow_loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the velocity (1)."""
    return ((velocity - target) ** 2).mean()


# ----------------------------------------------------------------------------------------- feed-forward and routing


def ffn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """GELU(x W1) W2 with GELU in its tanh form. x (..., D), w1 (D, F), w2 (F, D)."""
    return F.gelu(x @ w1, approximate="tanh") @ w2


def affinity(x: Tensor, w_router: Tensor) -> Tensor:
    """A = softmax(x W_r) over experts, in fp32 at least (5). x (G, T, D), w_router (D, E) -> (G, T, E)."""
    at_least_fp32 = torch.promote_types(x.dtype, torch.float32)
    return torch.softmax(x.to(at_least_fp32) @ w_router.to(at_least_fp32), dim=-1)


def expert_choice(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Each expert's top-C tokens and their affinities (6). Ties go to the lower token index.

    scores (G, T, E) -> gates (G, E, C), indices (G, E, C).
    """
    ranked, index = scores.transpose(1, 2).sort(dim=-1, descending=True, stable=True)
    return ranked[..., :capacity], index[..., :capacity]


def expert_choice_moe(
    x: Tensor, w_router: Tensor, w1: Tensor, w2: Tensor, capacity_factor: float, scored: Tensor | None = None
) -> Tensor:
    """The expert-choice layer, (5) to (8), Algorithm 1.

    x (G, T, D), w_router (D, E), w1 (E, D, F), w2 (E, F, D) -> (G, T, D). The gate is the affinity itself; a token
    that no expert takes gets zero. scored (G, T, D): what the router reads; None: x.
    """
    tokens, experts = x.shape[1], w1.shape[0]
    scores = affinity(x if scored is None else scored, w_router)
    gates, index = expert_choice(scores, int(tokens * capacity_factor / experts))
    out = torch.zeros_like(x)
    for g in range(x.shape[0]):
        for e in range(experts):
            taken = ffn(x[g, index[g, e]], w1[e], w2[e])
            out[g] = out[g].index_add(0, index[g, e], gates[g, e, :, None].to(x.dtype) * taken)
    return out


def token_choice_moe(
    x: Tensor, w_router: Tensor, w1: Tensor, w2: Tensor, capacity_factor: float, scored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The baseline: GShard's top-2 gating (Lepikhin et al. 2020, Algorithm 1) with capacity C = T f_c / E.

    Gates are renormalised over the two choices; an expert takes first choices before second ones, each in the order
    of the tokens, and drops what is over its capacity. Returns the output (G, T, D) and the auxiliary loss: E times
    the sum over experts of (share of first choices) * (mean affinity), mean over groups. scored (G, T, D): what the
    router reads; None: x.
    """
    groups, tokens, _ = x.shape
    experts = w1.shape[0]
    capacity = int(tokens * capacity_factor / experts)
    scores = affinity(x if scored is None else scored, w_router)
    out, aux = torch.zeros_like(x), scores.new_zeros(())
    for g in range(groups):
        top, choice = scores[g].sort(dim=-1, descending=True, stable=True)
        first, second = choice[:, 0], choice[:, 1]
        gates = top[:, :2] / top[:, :2].sum(-1, keepdim=True)
        aux = aux + experts * (F.one_hot(first, experts).to(scores).mean(0) * scores[g].mean(0)).sum() / groups
        for e in range(experts):
            queue = [(token, 0) for token in (first == e).nonzero().flatten().tolist()]
            queue += [(token, 1) for token in (second == e).nonzero().flatten().tolist()]
            if not queue[:capacity]:
                continue
            token, rank = (torch.tensor(part, device=x.device) for part in zip(*queue[:capacity], strict=True))
            taken = ffn(x[g, token], w1[e], w2[e])
            out[g] = out[g].index_add(0, token, gates[token, rank, None].to(x.dtype) * taken)
    return out, aux


# ------------------------------------------------------------------------------------------------- parts of a block


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape))


class Linear(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, bias: bool = False):
        super().__init__()
        self.weight = parameter(fan_out, fan_in)
        self.bias = parameter(fan_out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(d)) v with each key-value head shared by H / KV query heads.

    query (B, S, KV, H / KV, d), key and value (B, L, KV, d), mask (B, L), True where a token is real
    -> (B, S, D).
    """
    scores = torch.einsum("bskrd,blkd->bkrsl", query, key) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, None, :], -math.inf)
    return torch.einsum("bkrsl,blkd->bskrd", scores.softmax(-1), value).flatten(2)


class SelfAttention(nn.Module):
    """Grouped-query self-attention. The rows of `qkv` stand by key-value head: its queries, its key, its value."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.kv_heads, self.head = kv_heads, width // heads
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head)
        self.out = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (self.kv_heads, -1, self.head))
        return self.out(attend(qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]))


class CrossAttention(nn.Module):
    """Grouped-query attention to the text, padding masked (2) (3)."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.kv_heads, self.head = kv_heads, width // heads
        self.query = Linear(width, width)
        self.key_value = Linear(width, 2 * kv_heads * self.head)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.kv_heads, -1, self.head))
        kv = self.key_value(text).unflatten(-1, (self.kv_heads, 2, self.head))
        return self.out(attend(query, kv[..., 0, :], kv[..., 1, :], mask))


class Ffn(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ffn(x, self.up.weight.T, self.down.weight.T), x.new_zeros((), dtype=torch.float32)


class Moe(nn.Module):
    """A MoE layer over groups of `group_tokens` tokens, taken from consecutive images."""

    def __init__(self, config: Config):
        super().__init__()
        width, experts = config.width, config.experts
        self.config = config
        self.router = nn.Module()
        self.router.weight = parameter(width, experts)
        self.experts = nn.Module()
        self.experts.up = parameter(experts, 4 * width, width)
        self.experts.down = parameter(experts, width, 4 * width)

    def forward(self, x: Tensor, group_tokens: int, scored: Tensor) -> tuple[Tensor, Tensor]:
        groups, scored = (part.reshape(-1, group_tokens, x.shape[-1]) for part in (x, scored))
        weights = (self.router.weight, self.experts.up.mT, self.experts.down.mT)
        if self.config.routing == "expert_choice":
            out = expert_choice_moe(groups, *weights, self.config.capacity_factor, scored)
            return out.view_as(x), x.new_zeros((), dtype=torch.float32)
        out, aux = token_choice_moe(groups, *weights, self.config.capacity_factor, scored)
        return out.view_as(x), aux


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: LayerNorm without affine, then shift and scale. x (B, S, D); shift, scale (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One pre-norm block; in the paper the MoE layer stands in every even-numbered one, counted from 1 (4)."""

    def __init__(self, config: Config, sparse: bool):
        super().__init__()
        self.unmodulated = config.router_input == "unmodulated"
        self.modulation = Linear(config.width, 4 * config.width, bias=True)
        self.self_attention = SelfAttention(config.width, config.heads, config.kv_heads)
        self.cross_attention = CrossAttention(config.width, config.heads, config.kv_heads)
        self.sparse = sparse
        if sparse:
            self.moe = Moe(config)
        else:
            self.ffn = Ffn(config.width)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, group_tokens: int):
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(time)).chunk(4, dim=-1)
        x = x + self.self_attention(modulate(x, shift1, scale1))
        x = x + self.cross_attention(x, text, mask)
        h = modulate(x, shift2, scale2)
        scored = F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.unmodulated else h
        y, aux = self.moe(h, group_tokens, scored) if self.sparse else self.ffn(h)
        return x + y, aux


# ------------------------------------------------------------------------------------------------------ the network


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, c, h, w) -> (B, S, P): patches row by row; within one, row, column, channel."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, patch * patch * c)


def sine_cosine(positions: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """(N,) -> (N, width): cosines, then sines, at frequencies falling geometrically from 1 to nearly 1 / period."""
    frequency = torch.exp(-math.log(period) * torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = positions.to(torch.float64)[:, None] * frequency.to(positions.device)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D positions of side * side tokens -> (S, width): the row's half, then the column's half."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cat([sine_cosine(p.flatten(), width // 2) for p in (row, column)], dim=-1)


class Mlp(nn.Module):
    """Two linears with `activation` between them."""

    def __init__(self, fan_in: int, width: int, activation):
        super().__init__()
        self.up, self.down, self.activation = (
            Linear(fan_in, width, bias=True),
            Linear(width, width, bias=True),
            activation,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class EcDit(nn.Module):
    """The network without the optional decoder. Parameters are named as in `ecdit.EcDit`, so weights load straight."""

    TIME_FEATURES = 256

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width, patch_width = config.width, config.patch**2 * config.channels
        self.patch = Linear(patch_width, width, bias=True)
        self.time = Mlp(self.TIME_FEATURES, width, F.silu)
        self.text = Mlp(config.text_width, width, lambda x: F.gelu(x, approximate="tanh"))
        every = config.sparse_layers == "all"
        sparse = [config.routing != "dense" and (every or layer % 2 == 1) for layer in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, moe) for moe in sparse)
        self.final = nn.Module()
        self.final.modulation = Linear(width, 2 * width, bias=True)
        self.final.out = Linear(width, patch_width, bias=True)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        mask: Tensor,
        group_tokens: int,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocity of the kept tokens and the sum of the auxiliary losses.

        x (B, c, h, w), t (B,), text (B, L, Y), mask (B, L) True where real, keep (B, K) token indices
        -> (B, K, P), scalar.
        """
        config = self.config
        h = self.patch(patchify(x, config.patch))
        h = h + grid_positions(config.side // config.patch, config.width).to(h)
        if keep is not None:
            h = h.gather(1, keep[..., None].expand(-1, -1, config.width))
        time = self.time(sine_cosine(1000 * t, self.TIME_FEATURES).to(h))
        text = self.text(text)
        aux = torch.zeros((), device=x.device)
        for block in self.blocks:
            h, block_aux = block(h, time, text, mask, group_tokens)
            aux = aux + block_aux
        shift, scale = self.final.modulation(F.silu(time)).chunk(2, dim=-1)
        return self.final.out(modulate(h, shift, scale)), aux
