"""Latents and text embeddings for shards, in batches, on this rank's device.

Shapes: `B` pictures, `R` pixels a side, `c` latent channels, `h` latents a side, `n` real tokens, `Y` text width.
"""

import hashlib
from typing import Any

import numpy as np
import torch

from ecdit.data.encoded import Encoded, EncodedPictures, EncodedText, empty_as_text, to_bits
from ecdit.data.encoders import load_autoencoder, load_text_encoder
from ecdit.data.prepare.part import Ready
from ecdit.data.prepare.settings import Settings
from ecdit.data.pretrained import of_posterior
from parallel.philox import key_of, normal


class Encoders:
    """The encoders that a preparation asks for. In bf16 on a GPU, in fp32 elsewhere."""

    def __init__(self, settings: Settings, device: torch.device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._settings, self._device = settings, device
        self._autoencoder = self._text = None
        if settings.autoencoder:
            self._autoencoder = load_autoencoder(settings.autoencoder, device=device, dtype=dtype)
        if settings.text_encoder:
            self._text = load_text_encoder(
                settings.text_encoder, width=None, tokens=settings.text_tokens, device=device, dtype=dtype
            )

    def describe(self) -> Encoded:
        """For the file beside the shards."""
        pictures = text = None
        if self._autoencoder:
            it, settings = self._autoencoder, self._settings
            pictures = EncodedPictures(
                settings.autoencoder, settings.latents, it.channels, it.factor, it.scale, it.shift
            )
        if self._text:
            embedding, mask = self._text([""])
            empty = empty_as_text(embedding[0][mask[0]])
            text = EncodedText(self._settings.text_encoder, self._text.width, self._settings.text_tokens, empty)
        return Encoded(pictures, text)

    def __call__(self, good: list[Ready]) -> list[dict[str, Any]]:
        """The columns of some samples that hold latents and embeddings."""
        columns: list[dict[str, Any]] = [{} for _ in good]
        if self._autoencoder:
            self._add_latents(good, columns)
        if self._text:
            self._add_text(good, columns)
        return columns

    def _add_latents(self, good: list[Ready], columns: list[dict[str, Any]]) -> None:
        images = torch.from_numpy(np.stack([ready.pixels for ready in good])).permute(0, 3, 1, 2)
        mean, logvar = self._autoencoder.posterior(images.to(self._device))  # (B, c, h, h)
        if self._settings.latents == "posterior":
            named = {"latent_mean": mean, "latent_logvar": logvar}
        else:
            counters = torch.tensor([_number(ready.key) for ready in good], device=self._device)
            noise = normal(key_of(self._settings.seed, "posterior"), counters, mean[0].numel())
            named = {"latent": of_posterior(mean, logvar, noise.view_as(mean))}
        for name, values in named.items():
            for column, value in zip(columns, values.half().cpu().numpy(), strict=True):
                column[name] = value

    def _add_text(self, good: list[Ready], columns: list[dict[str, Any]]) -> None:
        embedded, mask = self._text([caption for ready in good for caption in ready.captions])
        first = 0
        for ready, column in zip(good, columns, strict=True):
            mine = slice(first, first + len(ready.captions))
            column["text"] = to_bits(embedded[mine][mask[mine]])  # (sum of n, Y): caption after caption
            column["text_tokens"] = mask[mine].sum(1).cpu().numpy().astype(np.int32)
            first = mine.stop


def _number(key: str) -> int:
    """A counter for a sample's own noise: the low 62 bits of its key's hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 2
