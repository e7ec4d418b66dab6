"""EC-DiT: noisy latents, a time and a text in; velocities and the record of the routing out.

Shapes: `B` images, `S` tokens of an image, `K` tokens that masking kept, `L` text tokens, `D` hidden, `T` tokens of a
routing group, `Y` width of the text embedding, `c` latent channels, `P` numbers in a patch. `b` images whose
activations this rank holds: B, but under sequence parallelism an equal share of them.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ecdit.diffusion.masking import gather_tokens, scatter_tokens
from ecdit.diffusion.patch import patchify
from ecdit.model.block import Block, recomputed
from ecdit.model.embed import TIME_FEATURES, Positions, time_features
from ecdit.model.kernels.adaln import modulate
from ecdit.model.layers import Mlp, gelu
from ecdit.model.moe import MegatronTopk, Moe
from ecdit.model.router import RoutingPlan
from ecdit.recipe_model import ModelRecipe
from parallel.layers import Linear
from parallel.parameters import initialize, parameter
from parallel.spread import Spread


@dataclass
class Output:
    """What a pipeline stage makes. velocity (B, K, P), or (B, S, P) with a decoder, of the last stage, else None;
    hidden (b, K + L + 1, D), what the next stage needs, of the others; one plan a MoE layer of the stage; aux, the sum
    of their losses."""

    velocity: Tensor | None
    hidden: Tensor | None
    plans: list[RoutingPlan]
    aux: Tensor


class EcDit(nn.Module):
    """The network of DESIGN 1 for a model recipe, or the part of it that `spread` gives this rank; its weights are a
    function of (recipe, seed).

    On the meta device it has shapes and no weights. It must match `ecdit.reference.EcDit`. `recompute`: what backward
    computes again instead of keeping, "none", "moe" or "block". `compiled`: whether torch.compile compiles the
    backbone's blocks for training; one of each kind is enough for all.
    """

    def __init__(
        self,
        recipe: ModelRecipe,
        seed: int = 0,
        spread: Spread | None = None,
        recompute: str = "none",
        *,
        compiled: bool = False,
    ):
        super().__init__()
        self._call = torch.compile(_call, dynamic=False) if compiled else _call
        self.recipe, self.recompute = recipe, recompute
        self.spread = spread = spread or Spread()
        width = recipe.width
        if spread.first_stage:
            self.patch = Linear(recipe.patch_width, width, bias=True)
            self.time = Mlp(TIME_FEATURES, width, F.silu)
            self.text = Mlp(recipe.text_width, width, gelu)
            self.positions = Positions(recipe.side // recipe.patch, width)
        # by their number in the whole model, so that names do not depend on the stage
        self.blocks = nn.ModuleDict({str(layer): self._block(layer) for layer in spread.layers(recipe.layers)})
        if spread.last_stage:
            self.decoder = Decoder(recipe, spread) if recipe.decoder.layers else None
            self.final = Final(recipe.decoder.width if self.decoder else width, width, recipe.patch_width)
        spread.mark_gradients(self)
        if not any(weight.is_meta for weight in self.parameters()):
            initialize(self, seed)

    def _block(self, layer: int) -> Block:
        recipe, spread = self.recipe, self.spread
        moe = None
        if recipe.sparse(layer) and recipe.routing == "megatron_topk":
            moe = MegatronTopk(recipe.width, recipe.experts, recipe.aux_loss, spread)
        elif recipe.sparse(layer):
            moe = Moe(recipe.width, recipe.experts, recipe.capacity_factor, recipe.routing, spread)
        return Block(
            recipe.width,
            recipe.heads,
            recipe.kv_heads,
            spread,
            moe,
            router_input=recipe.router_input,
            recompute_moe=self.recompute == "moe",
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor,
        *,
        keep: Tensor | None = None,
        group_tokens: int | None = None,
        hidden: Tensor | None = None,
    ) -> Output:
        """x (B, c, h, w) at times t (B,), text (B, L, Y), text_mask (B, L), True where a token is real.

        keep (B, K): the tokens that enter the backbone; None: all. group_tokens: T; None: the recipe's. hidden: what
        the stage before made, None on the first stage.
        """
        with self.spread.fp8.region():
            return self._forward(x, t, text, text_mask, keep, group_tokens or self.recipe.group_tokens, hidden)

    def _forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor,
        keep: Tensor | None,
        group_tokens: int,
        hidden: Tensor | None,
    ) -> Output:
        if hidden is None:
            h, words, time = self._embed(x, t, text, keep)
        else:
            length = hidden.shape[1] - text.shape[1] - 1
            h, words, time = hidden.split([length, text.shape[1], 1], dim=1)
            time = time.squeeze(1)
        spread, mask = self.spread, text_mask[:, None, None, :]
        everyones_words, everyones_time = spread.conditioning(words), spread.conditioning(time)
        plans = []
        for block in self.blocks.values():
            h, plan = self._run(block, h, everyones_time, everyones_words, mask, group_tokens)
            if plan is not None:
                plans.append(plan)
        losses = [plan.aux for plan in plans if plan.aux is not None]
        aux = torch.stack(losses).sum() if losses else torch.zeros((), device=h.device)
        if not spread.last_stage:
            return Output(None, torch.cat([h, words, time[:, None]], dim=1), plans, aux)
        if self.decoder is not None:
            h = self.decoder(h, time, words, mask, None if keep is None else spread.own(keep))
        return Output(spread.collect(self.final(h, time)), None, plans, aux)

    @torch.no_grad()
    def infer(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, group_tokens: int) -> Output:
        """The velocity on every rank, stage after stage, from the same inputs on all; plans of this rank's stage."""
        images, like, model = len(x), next(self.parameters()), self.recipe
        hidden = self.spread.receive(self.hidden_shape(images, model.tokens), like)
        out = self(x, t, text, text_mask, group_tokens=group_tokens, hidden=hidden)
        self.spread.send(out.hidden)
        out.velocity = self.spread.share(out.velocity, (images, model.tokens, model.patch_width), like)
        return out

    def hidden_shape(self, images: int, tokens: int) -> tuple[int, int, int]:
        """Shape of `Output.hidden` for B images with K tokens in the backbone."""
        images = images // self.spread.tensor_ranks if self.spread.sequence else images
        return images, tokens + self.recipe.text_tokens + 1, self.recipe.width

    def _embed(self, x: Tensor, t: Tensor, text: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of this rank's images: tokens (b, K, D), text (b, L, D), time (b, D)."""
        own, dtype = self.spread.own, self.patch.weight.dtype
        h = self.positions(self.patch(patchify(own(x), self.recipe.patch).to(dtype)))
        if keep is not None:
            h = gather_tokens(h, own(keep))
        return h, self.text(own(text).to(dtype)), self.time(time_features(own(t)).to(dtype))

    def _run(self, block: Block, *inputs) -> tuple[Tensor, RoutingPlan | None]:
        if not torch.is_grad_enabled():
            return block(*inputs)
        if self.recompute == "block":
            return recomputed(partial(self._call, block), self.spread, *inputs)
        return self._call(block, *inputs)


def _call(block: Block, *inputs) -> tuple[Tensor, RoutingPlan | None]:
    return block(*inputs)


class Final(nn.Module):
    """AdaLN and the projection to a patch's velocity, which starts as zero."""

    def __init__(self, width: int, time_width: int, patch_width: int):
        super().__init__()
        self.modulation = Linear(time_width, 2 * width, bias=True, std=0.0)
        self.out = Linear(width, patch_width, bias=True, std=0.0)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(b, S, D) -> (b, S, P)."""
        shift, scale = self.modulation(F.silu(time)).chunk(2, dim=-1)
        return self.out(modulate(x, shift, scale))


class Decoder(nn.Module):
    """MaskDiT's asymmetric decoder (Zheng et al. 2023): fills in mask tokens and sees the whole picture.

    Narrow dense blocks over all tokens, with positions of their own, conditioned on the backbone's time and text.
    """

    def __init__(self, recipe: ModelRecipe, spread: Spread):
        super().__init__()
        width, heads = recipe.decoder.width, recipe.decoder.heads
        self.spread = spread
        self.modulation = Linear(recipe.width, 2 * recipe.width, bias=True, std=0.0)
        self.narrow = Linear(recipe.width, width, bias=True)
        self.mask_token = parameter(width, std=0.0)
        self.time = Linear(recipe.width, width, bias=True)
        self.text = Linear(recipe.width, width, bias=True)
        self.blocks = nn.ModuleList(Block(width, heads, heads, spread) for _ in range(recipe.decoder.layers))
        self.positions = Positions(recipe.side // recipe.patch, width)

    def forward(self, x: Tensor, time: Tensor, text: Tensor, mask: Tensor, keep: Tensor | None) -> Tensor:
        """x (b, K, D), time (b, D), text (b, L, D), mask (B, 1, 1, L), keep (b, K) or None
        -> (b, S, width of the decoder)."""
        shift, scale = self.modulation(F.silu(time)).chunk(2, dim=-1)
        x = self.narrow(modulate(x, shift, scale))
        # the mask token is part of the sum even when nothing is masked, so that it always has a gradient
        fill = self.mask_token.expand(x.shape[0], self.positions.tokens, -1)
        x = scatter_tokens(x, keep, fill) if keep is not None else x + 0 * fill
        x = self.positions(x)
        time, text = self.spread.conditioning(self.time(time)), self.spread.conditioning(self.text(text))
        for block in self.blocks:
            x, _ = block(x, time, text, mask, 0)
        return x
