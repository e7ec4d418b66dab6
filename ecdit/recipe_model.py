"""The section of a recipe that says what the network is."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ecdit.model.sizes import SIZES
from ecdit.recipe_rules import divides
from ecdit.recipe_section import PositiveFloat, PositiveInt, Section


class DecoderRecipe(Section):
    """The asymmetric decoder of MaskDiT, over all tokens; 0 layers leave it out."""

    layers: Annotated[int, Field(ge=0)] = Field(0, description="Decoder blocks; 0: no decoder.")
    width: PositiveInt = Field(512, description="Hidden width of the decoder.")
    heads: PositiveInt = Field(16, description="Attention heads of the decoder.")


class ModelRecipe(Section):
    """What the network is. Everything that decides the shape of a weight stands here."""

    size: Literal["XL", "XXL", "3XL", "M"] | None = Field(
        None, description="A row of the paper's Table 1; sets layers, width, heads and kv_heads."
    )
    layers: PositiveInt = Field(description="Number of blocks.")
    width: PositiveInt = Field(description="Hidden width D; the FFN and every expert have 4 D.")
    heads: PositiveInt = Field(description="Query heads of both attentions.")
    kv_heads: PositiveInt = Field(description="Key and value heads of both attentions (grouped-query).")
    routing: Literal["dense", "expert_choice", "token_choice", "megatron_topk"] = Field(
        "expert_choice",
        description="What sparse blocks have for their feed-forward layer; megatron_topk (megatron-core's dropless "
        "top-2) needs a GPU and the extra te.",
    )
    sparse_layers: Literal["every_second", "all"] = Field(
        "every_second", description="Which blocks are sparse: every second one, from the second on, or all."
    )
    router_input: Literal["modulated", "unmodulated"] = Field(
        "modulated",
        description="What a router reads: its layer's input, which the time has shifted and scaled, or that without.",
    )
    experts: PositiveInt = Field(8, description="Experts E of a MoE layer.")
    capacity_factor: PositiveFloat = Field(
        2.0, description="f_c: experts that a token meets on average; C = T f_c / E."
    )
    group_tokens: PositiveInt = Field(1024, description="Tokens T of a routing group in training.")
    aux_loss: Annotated[float, Field(ge=0)] = Field(
        0.01, description="Weight of the load-balancing loss; used by token_choice and megatron_topk."
    )
    side: PositiveInt = Field(32, description="Side of the latent picture.")
    channels: PositiveInt = Field(4, description="Channels c of the latent picture.")
    patch: PositiveInt = Field(2, description="Side of a patch of the latent picture; a patch is a token.")
    text_width: PositiveInt = Field(2048, description="Width Y of the text embedding.")
    text_tokens: PositiveInt = Field(120, description="Text tokens L; longer captions are cut.")
    decoder: DecoderRecipe = Field(DecoderRecipe(), description="Decoder of masked training.")

    @property
    def tokens(self) -> int:
        """S, the tokens of a whole image."""
        return (self.side // self.patch) ** 2

    @property
    def patch_width(self) -> int:
        """Numbers in a patch: patch * patch * channels."""
        return self.patch**2 * self.channels

    @property
    def sample_group_tokens(self) -> int:
        """Tokens of a routing group in sampling: an image's conditional and unconditional half."""
        return 2 * self.tokens

    def sparse(self, layer: int) -> bool:
        """Whether block `layer`, counted from 0, has a MoE layer."""
        return self.routing != "dense" and (self.sparse_layers == "all" or layer % 2 == 1)

    @property
    def grouped(self) -> bool:
        """Whether routing is within groups of tokens, with a capacity."""
        return self.routing in ("expert_choice", "token_choice")

    def capacity(self, group_tokens: int) -> int:
        """C, the tokens that each expert takes of a group."""
        return int(group_tokens * self.capacity_factor / self.experts)

    @model_validator(mode="before")
    @classmethod
    def _fill_size(cls, values):
        if not isinstance(values, dict) or values.get("size") not in SIZES:
            return values
        shape = SIZES[values["size"]]
        routing = values.get("routing", "expert_choice")
        named = {
            "layers": shape.depth(routing),
            "width": shape.width,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
        }
        for key, value in named.items():
            if values.get(key, value) != value:
                raise ValueError(
                    f"@{key}: {values[key]} contradicts size: {values['size']}, which has {value} under "
                    f"routing: {routing}; leave one of the two out (size: null)"
                )
        return values | named

    @model_validator(mode="after")
    def _shapes_divide(self):
        divides(self.heads, self.width, "heads", "width")
        divides(self.kv_heads, self.heads, "kv_heads", "heads")
        divides(self.patch, self.side, "patch", "side")
        if self.width % 4:
            raise ValueError(f"@width: {self.width} is no multiple of 4 (sine-cosine positions need it)")
        if self.decoder.layers:
            divides(self.decoder.heads, self.decoder.width, "decoder.heads", "decoder.width")
        if self.grouped:
            for tokens, use in ((self.group_tokens, "training"), (self.sample_group_tokens, "sampling")):
                self._capacity_is_whole(tokens, use)
        if self.routing == "megatron_topk" and self.router_input != "modulated":
            raise ValueError(
                f"@router_input: {self.router_input} does not go with routing: megatron_topk, whose layer has its own "
                "router; set it to modulated"
            )
        if self.routing in ("token_choice", "megatron_topk") and self.experts < 2:
            raise ValueError(f"@experts: {self.experts} is too few for top-2 routing; at least 2")
        return self

    def _capacity_is_whole(self, tokens: int, use: str) -> None:
        rows = tokens * self.capacity_factor
        if rows % self.experts:
            both = (self.group_tokens * self.capacity_factor, self.sample_group_tokens * self.capacity_factor)
            valid = [e for e in range(1, 129) if e >= self.capacity_factor and not any(n % e for n in both)]
            raise ValueError(
                f"@experts: {self.experts} gives no whole capacity: in {use} a routing group has {tokens} tokens, "
                f"and capacity_factor {self.capacity_factor:g} makes {rows:g} rows to share; "
                f"try one of {', '.join(map(str, valid))}"
            )
        if rows > tokens * self.experts:
            raise ValueError(
                f"@capacity_factor: {self.capacity_factor:g} is over experts: {self.experts}; an expert cannot "
                f"take more than all tokens of a group, so at most {self.experts}"
            )
