"""The frozen encoders: captions to text embeddings, pictures to latents and back.

Two need no weights: `hash`, a fixed embedding of words, and `pixels`, for which the RGB picture is the latent. All
others are T5-family encoders (transformers) and AutoencoderKLs (diffusers), from a local folder or a hub name.

Shapes: `B` images, `L` text tokens, `Y` width of the text embedding, `c` latent channels, `R` pixels a side.
"""

import hashlib
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ecdit.data.torchvision_guard import hide_broken_torchvision
from ecdit.errors import UserError
from ecdit.recipe import Recipe


class TextEncoder(Protocol):
    """Captions to embeddings of fixed shape."""

    width: int

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, L, Y) in fp32 and (B, L), True where a token is real; the empty caption too has a real token."""


class Autoencoder(Protocol):
    """Pictures to latents and back. `factor`: pixels of a side for each latent of a side."""

    channels: int
    factor: int

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, c, R / factor, R / factor)."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, R / factor, R / factor) -> (B, 3, R, R) uint8."""


def load_text_encoder(
    name: str, *, width: int, tokens: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """`hash`, a folder or a hub name. Raises UserError where it cannot be had or is not `width` wide."""
    encoder = HashText(width, tokens, device) if name == "hash" else T5Text(name, tokens, device, dtype)
    if encoder.width != width:
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
            words = [self.START, *split_words(caption)][: self.tokens]
            out[row, : len(words)] = torch.stack([self._word(word) for word in words])
            mask[row, : len(words)] = True
        out, mask = out.to(self.device), mask.to(self.device)
        return (out + self._places) * mask[..., None], mask


def split_words(caption: str) -> list[str]:
    """Lower-case words of letters and digits."""
    return "".join(c if c.isalnum() else " " for c in caption.lower()).split()


class Pixels:
    """The RGB picture, scaled to [-1, 1], is the latent."""

    channels = 3
    factor = 1

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, 3, R, R)."""
        return images.float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, 3, R, R) uint8."""
        return to_bytes(latents)


class T5Text:
    """A T5-family encoder; captions are cut at L tokens. Runs in `dtype`, answers in fp32."""

    def __init__(self, name: str, tokens: int, device: torch.device, dtype: torch.dtype):
        transformers = _package("transformers", "data.text_encoder", name)
        where = {"local_files_only": _is_local("data.text_encoder", name)}
        load = _loader("data.text_encoder", name, "a T5-family encoder with its tokenizer")
        self._tokenizer = load(transformers.AutoTokenizer.from_pretrained, name, **where)
        model = load(transformers.T5EncoderModel.from_pretrained, name, dtype=dtype, **where)
        self._model = model.to(device).eval().requires_grad_(False)
        self.width, self.tokens, self.device = model.config.d_model, tokens, device

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        batch = self._tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(self.device)
        mask = batch["attention_mask"].bool()
        mask[:, 0] = True  # a tokenizer without an end token makes nothing of the empty caption
        out = self._model(input_ids=batch["input_ids"], attention_mask=mask.long()).last_hidden_state
        return out.float() * mask[..., None], mask


class KlLatents:
    """An AutoencoderKL's latents, scaled and shifted as its configuration says.

    The mode of the posterior is taken, not a sample: a run's only randomness is its counter-based generator's.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype):
        diffusers = _package("diffusers", "data.autoencoder", name)
        load = _loader("data.autoencoder", name, "an AutoencoderKL")
        local = _is_local("data.autoencoder", name)
        subfolder = {"subfolder": "vae"} if local and (Path(name) / "vae").is_dir() else {}
        model = load(
            diffusers.AutoencoderKL.from_pretrained, name, torch_dtype=dtype, local_files_only=local, **subfolder
        )
        self._model = model.to(device).eval().requires_grad_(False)
        self._dtype = dtype
        self.channels = model.config.latent_channels
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        self._scale, self._shift = model.config.scaling_factor, model.config.shift_factor or 0.0

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, R, R) uint8 -> (B, c, R / factor, R / factor)."""
        posterior = self._model.encode((images.float() / 127.5 - 1).to(self._dtype)).latent_dist
        return ((posterior.mode() - self._shift) * self._scale).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, R / factor, R / factor) -> (B, 3, R, R) uint8."""
        return to_bytes(self._model.decode((latents / self._scale + self._shift).to(self._dtype)).sample)


def load_checked_autoencoder(recipe: Recipe, device: torch.device) -> Autoencoder:
    """The recipe's autoencoder. Raises UserError where its latents are not what the model is made for."""
    loaded = load_autoencoder(recipe.data.autoencoder, device=device, dtype=torch.float32)
    side, model = recipe.data.resolution // loaded.factor, recipe.model
    for key, value, needed in (("channels", model.channels, loaded.channels), ("side", model.side, side)):
        if value != needed:
            raise UserError(
                f"model.{key}: {value} does not fit data.autoencoder: {recipe.data.autoencoder}, whose latents of "
                f"data.resolution {recipe.data.resolution} have {needed}"
            )
    return loaded


def to_bytes(pictures: Tensor) -> Tensor:
    """[-1, 1] -> uint8, cut off beyond."""
    return ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _package(package: str, key: str, name: str) -> Any:
    hide_broken_torchvision()
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{key}: {name!r} needs the package {package}; install the extra `ecdit[encoders]`") from None


def _is_local(key: str, name: str) -> bool:
    """Whether the name is a folder. Raises UserError where it looks like one and is not there."""
    path = Path(name).expanduser()
    if path.is_dir():
        return True
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        valid = "hash" if key == "data.text_encoder" else "pixels"
        raise UserError(f"{key}: {name!r}: no such folder; valid: {valid}, a local folder, or a hub name")
    return False


def _loader(key: str, name: str, kind: str) -> Callable[..., Any]:
    """Calls a `from_pretrained` with its many errors turned into one UserError."""

    def load(from_pretrained: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return from_pretrained(*args, **kwargs)
        except Exception as error:
            cause = " ".join(str(error).split())[:300]
            raise UserError(f"{key}: {name!r} cannot be loaded as {kind}: {cause}") from None

    return load
