"""What shards say of the encoders that their latents and embeddings come from: one JSON file beside their index.

Shapes: `n` real tokens of a caption, `Y` width of the text embedding.
"""

import base64
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ecdit.data.cache import is_local, local_path
from ecdit.data.remote import download
from ecdit.errors import UserError

ENCODED = "encoded.json"


@dataclass(frozen=True)
class EncodedPictures:
    """latents: `posterior`, mean and log-variance as the autoencoder gives them, or `sample`, one drawn from it.

    Neither is scaled: a model's latent is (stored - shift) * scale.
    """

    autoencoder: str
    latents: Literal["posterior", "sample"]
    channels: int
    factor: int
    scale: float
    shift: float


@dataclass(frozen=True)
class EncodedText:
    """empty: the embedding of the empty caption (n, Y), as bfloat16's bits in base64."""

    text_encoder: str
    width: int
    tokens: int
    empty: str

    def empty_embedding(self) -> Tensor:
        """(n, Y) in bf16."""
        bits = np.frombuffer(base64.b64decode(self.empty), np.uint16)
        return from_bits(bits.reshape(-1, self.width))


@dataclass(frozen=True)
class Encoded:
    """What is encoded in a data set; None: what is not."""

    pictures: EncodedPictures | None = None
    text: EncodedText | None = None

    def as_json(self) -> str:
        """For the file."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_encoded(source: str) -> Encoded:
    """Raises UserError where shards have latents or embeddings and do not say whose."""
    try:
        if is_local(source):
            text = (local_path(source) / ENCODED).read_text(encoding="utf-8")
        else:
            with tempfile.TemporaryDirectory() as folder:
                download(f"{source}/{ENCODED}", Path(folder, ENCODED))
                text = Path(folder, ENCODED).read_text(encoding="utf-8")
        found = json.loads(text)
        pictures, embedded = found["pictures"], found["text"]
        return Encoded(pictures and EncodedPictures(**pictures), embedded and EncodedText(**embedded))
    except FileNotFoundError:
        return Encoded()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data.streams: {source}/{ENCODED} cannot be read: {error!r}") from None


def to_bits(values: Tensor) -> np.ndarray:
    """bfloat16's bits, for numpy has no such type: a tensor of any shape -> uint16."""
    return values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().view(np.uint16)


def from_bits(bits: np.ndarray) -> Tensor:
    """The inverse, (n, Y) uint16 -> bf16."""
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


def empty_as_text(embedding: Tensor) -> str:
    """For `EncodedText.empty`. embedding (n, Y)."""
    return base64.b64encode(to_bits(embedding).tobytes()).decode()
