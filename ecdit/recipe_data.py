"""The section of a recipe that says where images and captions come from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ecdit.recipe_section import PositiveFloat, PositiveInt, Section


class StreamRecipe(Section):
    """MDS shards, and how much of the batches comes from them."""

    path: str = Field(description="Folder or URL (s3://, gs://, https://, hf://, ...) of index.json and the shards.")
    proportion: PositiveFloat | None = Field(
        None, description="Its share of the samples, against the other streams'; null: as many as it has."
    )


class CacheRecipe(Section):
    """Where shards lie that come from a URL or are compressed, on every node."""

    folder: str | None = Field(None, description="On the node's own disk; null: a folder for temporary files.")
    limit: PositiveFloat | None = Field(
        None, description="GiB that it may hold: what was not used for longest is removed; null: all shards stay."
    )
    predownload: PositiveInt = Field(8192, description="Samples of a rank ahead of which shards are fetched.")


class DataRecipe(Section):
    """Where images and captions come from, and the frozen encoders that read them."""

    streams: list[StreamRecipe] = Field(min_length=1, description="Shards; their samples are mixed.")
    text_encoder: str = Field(
        "hash", description="hash, or a T5, T5Gemma or CLIP text encoder: a local folder or hub name (transformers)."
    )
    autoencoder: str = Field(
        "pixels", description="pixels, or an AutoencoderKL: a local folder or hub name (diffusers)."
    )
    shard_encoders: bool = Field(
        False, description="Spread the text encoder's weights over all ranks, instead of a copy on each."
    )
    posterior: Literal["mode", "sample"] = Field(
        "mode", description="Latents are the autoencoder's mean, or drawn anew from its posterior in every step."
    )
    resolution: PositiveInt = Field(256, description="Side of the pictures in the shards.")
    shuffle: bool = Field(True, description="Shuffle the samples, anew in every epoch.")
    canonical_nodes: PositiveInt = Field(
        1,
        description="Parts in which the data are dealt out, each to its own places of the batch; it belongs to the "
        "order of the samples. With as many as nodes, a node fetches its part of the shards alone.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(2, description="Processes that read ahead; 0: none.")
    cache: CacheRecipe = Field(CacheRecipe(), description="Shards that are not here.")

    @property
    def shares(self) -> list[float] | None:
        """Of the streams; None: each sample counts alike."""
        shares = [stream.proportion for stream in self.streams]
        return None if None in shares else shares

    @property
    def cache_folder(self) -> Path | None:
        """As a path."""
        return None if self.cache.folder is None else Path(self.cache.folder).expanduser()

    @model_validator(mode="after")
    def _all_proportions_or_none(self):
        given = [stream.proportion is not None for stream in self.streams]
        if any(given) and not all(given):
            raise ValueError(
                f"@streams.{given.index(False)}.proportion: null, where other streams have one; give all or none"
            )
        return self
