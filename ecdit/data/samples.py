"""Samples out of shards, as tensors: pictures or latents, captions or their embeddings.

Columns: `key`; `caption`, or `captions`, a list of which a draw takes one; `image`, or `latent_mean` and
`latent_logvar`, or `latent`; `text`, bfloat16's bits of the real tokens of all captions one after the other, and
`text_tokens`, how many each has.

Shapes: `b` samples, `R` pixels a side, `c` latent channels, `h` latents a side, `L` text tokens, `Y` their width,
`n` real tokens of a caption.
"""

import io
from bisect import bisect_right
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ecdit.data.encoded import from_bits
from ecdit.data.shards import ShardFolder
from ecdit.errors import UserError

PICTURE_COLUMNS = ("latent_mean", "latent", "image")  # the first that shards have is read


@dataclass
class Sample:
    """One sample. image (3, R, R) uint8, or mean (c, h, h) and logvar, or mean alone; text (n, Y) bf16 or None."""

    key: str
    caption: str
    image: Tensor | None = None
    mean: Tensor | None = None
    logvar: Tensor | None = None
    text: Tensor | None = None


@dataclass
class Samples:
    """Some samples, stacked. text (b, L, Y) and text_mask (b, L), True where a token is real."""

    keys: list[str]
    captions: list[str]
    image: Tensor | None
    mean: Tensor | None
    logvar: Tensor | None
    text: Tensor | None
    text_mask: Tensor | None

    def __getitem__(self, part: slice) -> "Samples":
        return Samples(*(None if value is None else value[part] for value in self._values()))

    def to(self, device: torch.device) -> "Samples":
        """On a device, without waiting where memory is pinned."""
        return Samples(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in self._values()))

    def pin_memory(self) -> "Samples":
        """What torch's loader calls."""
        return Samples(*(v.pin_memory() if isinstance(v, Tensor) else v for v in self._values()))

    def _values(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]


class SampleSet(Dataset):
    """Samples by (group, number, draw): groups of shard folders, a sample's number in its group, and the number in
    [0, 1) that picks one of its captions.

    What cannot be used is returned as the UserError that says so, since an exception would reach the main process
    wrapped in a worker's traceback.
    """

    def __init__(self, groups: list[list[ShardFolder]], resolution: int, latent_side: int, text_tokens: int):
        self.groups, self._tokens = groups, text_tokens
        self._resolution, self._latent_side = resolution, latent_side
        self._ends = [np.cumsum([len(folder) for folder in group]).tolist() for group in groups]

    def folder_of(self, group: int, number: int) -> tuple[ShardFolder, int]:
        """The folder that holds a sample, and its number there."""
        ends = self._ends[group]
        index = bisect_right(ends, number)
        return self.groups[group][index], number - (ends[index - 1] if index else 0)

    def __getitem__(self, which: tuple[int, int, float]) -> Sample | UserError:
        group, number, draw = which
        folder, index = self.folder_of(group, number)
        try:
            try:
                return self._read(folder, index, draw)
            except OSError as error:
                if folder.mend(index):
                    return self._read(folder, index, draw)
                return UserError(f"data.streams: {folder.source}: the picture of sample {index} is broken: {error}")
        except UserError as error:
            return error

    def _read(self, folder: ShardFolder, index: int, draw: float) -> Sample:
        stored = folder.sample(index)
        captions = stored["captions"] if "captions" in stored else [stored["caption"]]
        chosen = int(draw * len(captions))
        sample = Sample(str(stored["key"]), captions[chosen])
        if "latent_mean" in stored:
            sample.mean, sample.logvar = (torch.from_numpy(stored[f"latent_{k}"].copy()) for k in ("mean", "logvar"))
        elif "latent" in stored:
            sample.mean = torch.from_numpy(stored["latent"].copy())
        if sample.mean is not None:
            self._check_side(sample.mean.shape[-1], self._latent_side, "latents of", folder, sample.key)
        else:
            sample.image = self._pixels(stored["image"], folder, sample.key)
        if "text" in stored:
            ends = stored["text_tokens"].cumsum()
            sample.text = from_bits(stored["text"][ends[chosen] - stored["text_tokens"][chosen] : ends[chosen]])
        return sample

    def _pixels(self, picture: bytes | Image.Image, folder: ShardFolder, key: str) -> Tensor:
        opened = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        pixels = np.asarray(opened.convert("RGB"))
        for side in pixels.shape[:2]:
            self._check_side(side, self._resolution, "pictures of", folder, key)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def _check_side(self, found: int, wanted: int, what: str, folder: ShardFolder, key: str) -> None:
        if found != wanted:
            raise UserError(
                f"data.resolution: {self._resolution} asks for {what} side {wanted}: sample {key!r} in "
                f"{folder.source} has {found}"
            )

    def collate(self, samples: list[Sample | UserError]) -> Samples | UserError:
        """A list of samples as one of tensors, or the first error among them."""
        for sample in samples:
            if isinstance(sample, UserError):
                return sample

        def stacked(name: str) -> Tensor | None:
            values = [getattr(sample, name) for sample in samples]
            return None if values[0] is None else torch.stack(values)

        texts = [sample.text for sample in samples]
        text, mask = (None, None) if texts[0] is None else pad(texts, self._tokens)
        keys, captions = [sample.key for sample in samples], [sample.caption for sample in samples]
        return Samples(keys, captions, stacked("image"), stacked("mean"), stacked("logvar"), text, mask)


def pad(texts: list[Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """Embeddings (n, Y) of different lengths -> (b, L, Y), zero where there is no token, and the mask (b, L)."""
    lengths = torch.tensor([min(len(text), tokens) for text in texts])
    out = texts[0].new_zeros(len(texts), tokens, texts[0].shape[-1])
    for row, text in enumerate(texts):
        out[row, : len(text)] = text[:tokens]
    return out, torch.arange(tokens) < lengths[:, None]
