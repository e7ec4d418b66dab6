"""The frozen encoders: captions to text embeddings, pictures to latents and back.

Two need no weights: `hash`, a fixed embedding of words, and `pixels`, for which the RGB picture is the latent. All
others are pretrained (`ecdit.data.pretrained`), from a local folder or a hub name.

Shapes: `B` images, `L` text tokens, `Y` width of the text embedding, `c` latent channels, `R` pixels a side.
"""

import hashlib
import math
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ecdit.data.pretrained import KlLatents, PretrainedText, to_bytes
from ecdit.errors import UserError
from ecdit.recipe import Recipe
from parallel.device import to_device


class TextEncoder(Protocol):
    """Captions to embeddings of fixed shape."""

    width: int

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L, Y) in fp32 and (B, L), True where a token is real; the empty caption too has a real token."""

    def words(self, caption: str) -> list[str]:
        """What the caption's real tokens stand for, in their order."""

    def save(self, folder: Path) -> dict[str, str]:
        """Writes its parts into folders of a diffusers pipeline; their classes in transformers, by name of the part."""


class Autoencoder(Protocol):
    """Pictures to latents and back. `factor`: pixels of a side for each latent of a side."""

    channels: int
    factor: int

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, c, R / factor, R / factor), the likeliest latents or, by noise, a sample."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, R / factor, R / factor) -> (B, 3, R, R) uint8."""

    def save(self, folder: Path) -> dict[str, str]:
        """Writes itself into a folder of a diffusers pipeline; its class in diffusers, by name of the part."""


def load_text_encoder(
    name: str, *, width: int | None, tokens: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """`hash`, a folder or a hub name; width: what is expected, None: any. Raises UserError where it cannot be had or
    is not `width` wide."""
    if name == "hash":
        return HashText(width, tokens, device)
    encoder = PretrainedText(name, tokens, device, dtype)
    if width is not None and encoder.width != width:
        raise UserError(
            f"model.text_width: {width} does not fit data.text_encoder: {name}, which is {encoder.width} wide"
        )
    return encoder


def load_autoencoder(name: str, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """`pixels`, a folder or a hub name. Raises UserError where it cannot be had."""
    return Pixels() if name == "pixels" else KlLatents(name, device, dtype)


class HashText:
    """A fixed embedding of words, offline: each word a random vector drawn from its hash, plus its place.

    A vector has the unit variance of a T5 encoder's output after its final norm; places are sine-cosine features of
    half that scale, so that word order can be told. The first token is the same in every caption.
    """

    START = "<s>"
    PLACE_SCALE = 0.5

    def __init__(self, width: int, tokens: int, device: torch.device):
        self.width, self.tokens, self.device = width, tokens, device
        half = torch.arange((width + 1) // 2, dtype=torch.float64)
        angles = torch.arange(tokens)[:, None] * torch.exp(-math.log(10_000.0) * half / len(half))
        places = torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]
        self._places = (self.PLACE_SCALE * math.sqrt(2) * places).float().to(device)
        self._word = cache(self._draw)

    def _draw(self, word: str) -> Tensor:
        digest = hashlib.blake2b(word.encode(), digest_size=16).digest()
        words = np.random.Philox(key=int.from_bytes(digest, "little"))
        return torch.from_numpy(np.random.Generator(words).standard_normal(self.width, np.float32))

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        out = torch.zeros(len(captions), self.tokens, self.width)
        mask = torch.zeros(len(captions), self.tokens, dtype=torch.bool)
        for row, caption in enumerate(captions):
            words = self.words(caption)
            out[row, : len(words)] = torch.stack([self._word(word) for word in words])
            mask[row, : len(words)] = True
        out, mask = to_device(out, self.device), to_device(mask, self.device)
        return (out + self._places) * mask[..., None], mask

    def words(self, caption: str) -> list[str]:
        return [self.START, *split_words(caption)][: self.tokens]

    def save(self, folder: Path) -> dict[str, str]:
        return {}  # the pipeline makes it anew


def split_words(caption: str) -> list[str]:
    """Lower-case words of letters and digits."""
    return "".join(c if c.isalnum() else " " for c in caption.lower()).split()


class Pixels:
    """The RGB picture, scaled to [-1, 1], is the latent."""

    channels = 3
    factor = 1

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, 3, R, R); noise plays no part."""
        return images.float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, 3, R, R) uint8."""
        return to_bytes(latents)

    def save(self, folder: Path) -> dict[str, str]:
        return {}


def load_checked_autoencoder(recipe: Recipe, device: torch.device, dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The recipe's autoencoder. Raises UserError where its latents are not what the model is made for."""
    loaded = load_autoencoder(recipe.data.autoencoder, device=device, dtype=dtype)
    check_latents(recipe, loaded.channels, loaded.factor)
    return loaded


def check_latents(recipe: Recipe, channels: int, factor: int) -> None:
    """Raises UserError where latents of so many channels and pixels a side are not what the model is made for."""
    side, model = recipe.data.resolution // factor, recipe.model
    for key, value, needed in (("channels", model.channels, channels), ("side", model.side, side)):
        if value != needed:
            raise UserError(
                f"model.{key}: {value} does not fit data.autoencoder: {recipe.data.autoencoder}, whose latents of "
                f"data.resolution {recipe.data.resolution} have {needed}"
            )
