"""EC-DiT: noisy latents, a time and a text in; velocities and the record of the routing out.

Shapes: `B` images, `S` tokens of an image, `K` tokens that masking kept, `L` text tokens, `D` hidden, `T` tokens of a
routing group, `Y` width of the text embedding, `c` latent channels, `P` numbers in a patch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit.diffusion.masking import gather_tokens, scatter_tokens
from ecdit.diffusion.patch import patchify
from ecdit.model.block import Block
from ecdit.model.embed import TIME_FEATURES, Positions, time_features
from ecdit.model.layers import Linear, Mlp, gelu, initialize, modulate, parameter
from ecdit.model.moe import Moe
from ecdit.model.router import RoutingPlan
from ecdit.recipe import ModelRecipe


@dataclass
class Output:
    """velocity (B, K, P), or (B, S, P) with a decoder; one plan a MoE layer; aux, the sum of their losses."""

    velocity: Tensor
    plans: list[RoutingPlan]
    aux: Tensor


class EcDit(nn.Module):
    """The network of DESIGN 1 for a model recipe; its weights are a function of (recipe, seed).

    On the meta device it has shapes and no weights. It must match `ecdit.reference.EcDit`.
    """

    def __init__(self, recipe: ModelRecipe, seed: int = 0):
        super().__init__()
        self.recipe = recipe
        width = recipe.width
        self.patch = Linear(recipe.patch_width, width, bias=True)
        self.time = Mlp(TIME_FEATURES, width, F.silu)
        self.text = Mlp(recipe.text_width, width, gelu)
        self.blocks = nn.ModuleList(self._block(layer) for layer in range(recipe.layers))
        self.decoder = Decoder(recipe) if recipe.decoder.layers else None
        self.final = Final(recipe.decoder.width if self.decoder else width, width, recipe.patch_width)
        self.positions = Positions(recipe.side // recipe.patch, width)
        if self.patch.weight.device.type != "meta":
            initialize(self, seed)

    def _block(self, layer: int) -> Block:
        recipe = self.recipe
        moe = None
        if recipe.sparse(layer):
            moe = Moe(recipe.width, recipe.experts, recipe.capacity_factor, recipe.routing)
        return Block(recipe.width, recipe.heads, recipe.kv_heads, moe)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor,
        *,
        keep: Tensor | None = None,
        group_tokens: int | None = None,
    ) -> Output:
        """x (B, c, h, w) at times t (B,), text (B, L, Y), text_mask (B, L), True where a token is real.

        keep (B, K): the tokens that enter the backbone; None: all. group_tokens: T; None: the recipe's.
        """
        group_tokens = group_tokens or self.recipe.group_tokens
        dtype = self.patch.weight.dtype
        h = self.positions(self.patch(patchify(x, self.recipe.patch).to(dtype)))
        if keep is not None:
            h = gather_tokens(h, keep)
        time = self.time(time_features(t).to(dtype))
        text = self.text(text.to(dtype))
        mask = text_mask[:, None, None, :]
        plans = []
        for block in self.blocks:
            h, plan = block(h, time, text, mask, group_tokens)
            if plan is not None:
                plans.append(plan)
        if self.decoder is not None:
            h = self.decoder(h, time, text, mask, keep)
        losses = [plan.aux for plan in plans if plan.aux is not None]
        aux = torch.stack(losses).sum() if losses else torch.zeros((), device=x.device)
        return Output(self.final(h, time), plans, aux)


class Final(nn.Module):
    """AdaLN and the projection to a patch's velocity, which starts as zero."""

    def __init__(self, width: int, time_width: int, patch_width: int):
        super().__init__()
        self.modulation = Linear(time_width, 2 * width, bias=True, std=0.0)
        self.out = Linear(width, patch_width, bias=True, std=0.0)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, P)."""
        shift, scale = self.modulation(F.silu(time)).chunk(2, dim=-1)
        return self.out(modulate(x, shift, scale))


class Decoder(nn.Module):
    """MaskDiT's asymmetric decoder (Zheng et al. 2023): fills in mask tokens and sees the whole picture.

    Narrow dense blocks over all tokens, with positions of their own, conditioned on the backbone's time and text.
    """

    def __init__(self, recipe: ModelRecipe):
        super().__init__()
        width, heads = recipe.decoder.width, recipe.decoder.heads
        self.modulation = Linear(recipe.width, 2 * recipe.width, bias=True, std=0.0)
        self.narrow = Linear(recipe.width, width, bias=True)
        self.mask_token = parameter(width, std=0.0)
        self.time = Linear(recipe.width, width, bias=True)
        self.text = Linear(recipe.width, width, bias=True)
        self.blocks = nn.ModuleList(Block(width, heads, heads) for _ in range(recipe.decoder.layers))
        self.positions = Positions(recipe.side // recipe.patch, width)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, keep: Tensor | None) -> Tensor:
        """x (B, K, D), time (B, D), text (B, L, D), keep (B, K) or None -> (B, S, width of the decoder)."""
        shift, scale = self.modulation(F.silu(time)).chunk(2, dim=-1)
        x = self.narrow(modulate(x, shift, scale))
        # the mask token is part of the sum even when nothing is masked, so that it always has a gradient
        fill = self.mask_token.expand(x.shape[0], self.positions.tokens, -1)
        x = scatter_tokens(x, keep, fill) if keep is not None else x + 0 * fill
        x = self.positions(x)
        time, text = self.time(time), self.text(text)
        for block in self.blocks:
            x, _ = block(x, time, text, mask, 0)
        return x
