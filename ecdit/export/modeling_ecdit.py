"""EC-DiT for inference, as a diffusers model: one file that needs torch and diffusers and nothing else.

It travels with exported weights. Sun et al. 2024, arXiv 2410.02098; (n) is the paper's equation.

Shapes: `B` rows, each an image with a caption, `S` tokens of an image, `L` text tokens, `D` hidden, `E` experts, `C`
capacity, `G` routing groups, `T` tokens of a group, `KV` key-value heads, `Y` width of the text embedding, `c` latent
channels, `P` numbers in a patch.
"""

import math

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

TIME_FEATURES = 256


class EcDitTransformer(ModelMixin, ConfigMixin):
    """Velocity of noisy latents at a time, from noise (t = 0) to data (t = 1), for a text."""

    # patch_size, not patch: diffusers finds a configuration's names before a module's
    @register_to_config
    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        kv_heads: int,
        routing: str,
        experts: int,
        capacity_factor: float,
        side: int,
        channels: int,
        patch_size: int,
        text_width: int,
        text_tokens: int,
        decoder_layers: int = 0,
        decoder_width: int = 512,
        decoder_heads: int = 16,
        sparse_layers: str = "every_second",
        router_input: str = "modulated",
    ):
        super().__init__()
        patch_width = patch_size**2 * channels
        self.patch = nn.Linear(patch_width, width)
        self.time = Mlp(TIME_FEATURES, width, F.silu)
        self.text = Mlp(text_width, width, gelu)
        sparse = [routing != "dense" and (sparse_layers == "all" or layer % 2 == 1) for layer in range(layers)]
        self.blocks = nn.ModuleList(
            Block(width, heads, kv_heads, Moe(width, experts, capacity_factor, routing) if moe else None, router_input)
            for moe in sparse
        )
        self.decoder = None
        if decoder_layers:
            self.decoder = Decoder(width, decoder_width, decoder_heads, decoder_layers, side // patch_size)
        last = decoder_width if decoder_layers else width
        self.final = nn.Module()
        self.final.modulation = nn.Linear(width, 2 * last)
        self.final.out = nn.Linear(last, patch_width)

    @property
    def tokens(self) -> int:
        """S."""
        return (self.config.side // self.config.patch_size) ** 2

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, group_tokens: int) -> Tensor:
        """x (B, c, h, w), t (B,), text (B, L, Y), mask (B, L), True where a token is real -> (B, c, h, w) in fp32.

        B * S must be a multiple of `group_tokens`, within which experts choose."""
        config, dtype = self.config, self.patch.weight.dtype
        h = self.patch(patchify(x, config.patch_size).to(dtype))
        h = h + grid_positions(config.side // config.patch_size, config.width).to(h)
        time = self.time(sine_cosine(1000 * t, TIME_FEATURES).to(dtype))
        words = self.text(text.to(dtype))
        mask = mask[:, None, None, :]
        for block in self.blocks:
            h = block(h, time, words, mask, group_tokens)
        if self.decoder is not None:
            h = self.decoder(h, time, words, mask)
        shift, scale = self.final.modulation(F.silu(time)).chunk(2, dim=-1)
        return unpatchify(self.final.out(modulate(h, shift, scale)).float(), config.patch_size, config.channels)


class Block(nn.Module):
    """Self-attention, cross-attention (2) (3), then the feed-forward layer or the mixture of experts (4)."""

    def __init__(
        self, width: int, heads: int, kv_heads: int, moe: nn.Module | None = None, router_input: str = "modulated"
    ):
        super().__init__()
        self.router_input = router_input
        self.modulation = nn.Linear(width, 4 * width)
        self.self_attention = SelfAttention(width, heads, kv_heads)
        self.cross_attention = CrossAttention(width, heads, kv_heads)
        self.sparse = moe is not None
        if self.sparse:
            self.moe = moe
        else:
            self.ffn = Ffn(width)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, group_tokens: int) -> Tensor:
        shift1, scale1, shift2, scale2 = self.modulation(F.silu(time)).chunk(4, dim=-1)
        x = x + self.self_attention(modulate(x, shift1, scale1))
        x = x + self.cross_attention(x, text, mask)
        h = modulate(x, shift2, scale2)
        if not self.sparse:
            return x + self.ffn(h)
        read = h if self.router_input == "modulated" else F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return x + self.moe(h, group_tokens, read)


class SelfAttention(nn.Module):
    """Grouped-query. Rows of `qkv`: for each key-value head its queries, its key, its value."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.kv_heads, self.head = kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (self.kv_heads, -1, self.head))
        return self.out(attend(qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]))


class CrossAttention(nn.Module):
    """Grouped-query, to the text. Rows of `key_value`: for each key-value head its key, its value."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.kv_heads, self.head = kv_heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * kv_heads * self.head, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.kv_heads, -1, self.head))
        kv = self.key_value(text).unflatten(-1, (self.kv_heads, 2, self.head))
        return self.out(attend(query, kv[..., 0, :], kv[..., 1, :], mask))


class Ffn(nn.Module):
    """GELU(x W1) W2."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class Moe(nn.Module):
    """Sum over the experts that took a token of gate * FFN(token), (5) to (8); zero where nobody took it."""

    def __init__(self, width: int, experts: int, capacity_factor: float, routing: str):
        super().__init__()
        self.capacity_factor = capacity_factor
        self.choose = {"expert_choice": expert_choice, "token_choice": token_choice}[routing]
        self.router, self.experts = nn.Module(), nn.Module()
        self.router.weight = nn.Parameter(torch.empty(width, experts))
        self.experts.up = nn.Parameter(torch.empty(experts, 4 * width, width))
        self.experts.down = nn.Parameter(torch.empty(experts, width, 4 * width))

    def forward(self, x: Tensor, group_tokens: int, scored: Tensor) -> Tensor:
        """scored: what the router reads of the tokens."""
        tokens, experts = x.reshape(-1, x.shape[-1]), self.router.weight.shape[1]
        affinity = torch.softmax(scored.reshape(tokens.shape).float() @ self.router.weight.float(), dim=-1).view(
            -1, group_tokens, experts
        )
        token, gate = self.choose(affinity, int(group_tokens * self.capacity_factor / experts))  # (E, R) both
        taken = gelu(torch.bmm(tokens[token], self.experts.up.mT))
        taken = torch.bmm(taken, self.experts.down.mT) * gate.to(x.dtype)[..., None]
        return torch.zeros_like(tokens).index_add_(0, token.flatten(), taken.flatten(0, 1)).view_as(x)


def expert_choice(affinity: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Each expert takes its top-C tokens of each group (6), ties to the lower index.

    affinity (G, T, E) -> token, counted over the groups, and gate (E, G C)."""
    groups, tokens, _ = affinity.shape
    ranked = affinity.permute(2, 0, 1).sort(dim=-1, descending=True, stable=True)  # (E, G, T)
    first = tokens * torch.arange(groups, device=affinity.device)[:, None]
    return (ranked.indices[..., :capacity] + first).flatten(1), ranked.values[..., :capacity].flatten(1)


def token_choice(affinity: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The baseline, GShard's top-2: gates renormalised over the two, first choices before second, those over an
    expert's capacity dropped. Shapes as in `expert_choice`; a gate is 0 where an expert's place stays empty."""
    tokens, experts = affinity.shape[1:]
    ranked = affinity.sort(dim=-1, descending=True, stable=True)
    gate = ranked.values[..., :2] / ranked.values[..., :2].sum(-1, keepdim=True)  # (G, T, 2)
    queue = F.one_hot(ranked.indices[..., :2].transpose(1, 2), experts).flatten(1, 2)  # (G, 2 T, E)
    kept = (queue * (queue.cumsum(1) <= capacity)).unflatten(1, (2, tokens))
    return expert_choice((kept * gate.transpose(1, 2)[..., None]).sum(1), capacity)


class Decoder(nn.Module):
    """MaskDiT's decoder (Zheng et al. 2023), as it works when nothing is masked: narrow dense blocks."""

    def __init__(self, width: int, narrow: int, heads: int, layers: int, side: int):
        super().__init__()
        self.side = side
        self.modulation = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.empty(narrow))  # of training alone
        self.time = nn.Linear(width, narrow)
        self.text = nn.Linear(width, narrow)
        self.blocks = nn.ModuleList(Block(narrow, heads, heads) for _ in range(layers))

    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(time)).chunk(2, dim=-1)
        x = self.narrow(modulate(x, shift, scale))
        x = x + grid_positions(self.side, x.shape[-1]).to(x)
        time, text = self.time(time), self.text(text)
        for block in self.blocks:
            x = block(x, time, text, mask, 0)
        return x


class Mlp(nn.Module):
    """Two linears with an activation between them."""

    def __init__(self, fan_in: int, width: int, activation):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(fan_in, width), nn.Linear(width, width), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """query (B, S, KV, queries of a head, d), key and value (B, L, KV, d), mask (B, 1, 1, L) -> (B, S, D)."""
    repeat = query.shape[3]
    query = query.flatten(2, 3).transpose(1, 2)
    key, value = (x.repeat_interleave(repeat, dim=2).transpose(1, 2) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def gelu(x: Tensor) -> Tensor:
    """In its tanh form."""
    return F.gelu(x, approximate="tanh")


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: LayerNorm without affine, then shift and scale. x (B, S, D); shift, scale (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, c, h, w) -> (B, S, P): patches row by row; within one, row, column, channel."""
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    x = x.unflatten(2, (rows, patch)).unflatten(4, (columns, patch))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """(B, S, P) of a square picture -> (B, c, h, w)."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(2, (patch, patch, channels)).unflatten(1, (side, side))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sine_cosine(positions: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width), in fp32 from fp64: cosines, then sines, at frequencies from 1 down to 1/10000."""
    powers = torch.arange(width // 2, device=positions.device, dtype=torch.float64) / (width // 2)
    angles = positions.double()[:, None] * torch.exp(-math.log(10_000.0) * powers)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def grid_positions(side: int, width: int) -> Tensor:
    """(side * side, width): half for a token's row, half for its column."""
    places = torch.arange(side * side)
    return torch.cat([sine_cosine(places // side, width // 2), sine_cosine(places % side, width // 2)], dim=-1)
