"""What a preparation was asked for: everything that its shards depend on, and nothing else."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ecdit.data.sources import Columns


@dataclass(frozen=True)
class Settings:
    """resolution, min_side: pixels. max_megapixels: of a picture before the crop. max_aspect: long over short side.

    part: pairs that a process takes at a time, where the source can be cut. shard_mib: size of a shard at most.
    latents, autoencoder, text_encoder, text_tokens: what is encoded into the shards; None: nothing. pictures: whether
    JPEG files are kept.
    """

    source: str
    resolution: int = 256
    crop: Literal["centre", "random"] = "centre"
    min_side: int = 256
    max_aspect: float | None = None
    max_megapixels: float = 64.0
    clean: bool = False
    columns: Columns = field(default_factory=Columns)
    seed: int = 0
    part: int = 4096
    shard_mib: int = 64
    compression: str | None = None
    latents: Literal["posterior", "sample"] | None = None
    autoencoder: str | None = None
    text_encoder: str | None = None
    text_tokens: int | None = None
    pictures: bool = True

    def as_dict(self) -> dict[str, Any]:
        """For the file beside the shards."""
        return asdict(self)
