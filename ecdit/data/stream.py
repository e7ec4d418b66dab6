"""The ordered global batch: which samples a step has, in which order, as a function of (data, seed, step).

streaming's loader keeps the set of a global batch when the number of ranks changes, not the order in it. So the order
comes from streaming's shuffle, a pure function, for one canonical rank; samples are read by streaming's shard readers
by their index. No state lives in a rank: resuming is asking for another step.

Shapes: `b` images of this rank, `R` pixels a side.
"""

import io
import signal
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ecdit.data.shards import open_shards
from ecdit.data.streaming_import import get_shuffle
from ecdit.errors import UserError

SHUFFLE = "py1e"  # streaming's default: samples of nearby shards mix, so that shards are read one after the other


@dataclass
class Batch:
    """One rank's slice of a step's global batch.

    images (b, 3, R, R) uint8; positions (b,) int64: the samples' places in the global batch.
    """

    step: int
    images: Tensor
    captions: list[str]
    keys: list[str]
    positions: Tensor


class TrainStream:
    """Endless batches over all samples of some folders of shards.

    An epoch is as many whole global batches as the samples fill; the rest is left out, another one every epoch.
    Raises UserError for shards that are missing or damaged, and for fewer samples than a batch.
    """

    def __init__(
        self,
        folders: list[Path],
        *,
        batch: int,
        resolution: int,
        data_rank: int = 0,
        data_ranks: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
    ):
        self._samples = _Samples(folders, resolution)
        self.batch, self.seed, self.shuffle, self.workers = batch, seed, shuffle, workers
        size = batch // data_ranks
        self._slice = slice(data_rank * size, (data_rank + 1) * size)
        self.steps_per_epoch = len(self._samples) // batch
        if not self.steps_per_epoch:
            raise UserError(
                f"train.batch: {batch} is more than the {len(self._samples)} samples of data.streams; "
                f"try at most {len(self._samples)}"
            )
        self._epoch, self._order = -1, np.empty((0, batch), np.int64)

    def ids(self, step: int) -> list[int]:
        """The whole ordered global batch of a step, as sample numbers over all folders."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = np.arange(len(self._samples))
            if self.shuffle:
                order = get_shuffle(SHUFFLE, self._samples.shard_sizes, 1, self.seed, epoch)
            used = self.steps_per_epoch * self.batch
            self._epoch, self._order = epoch, order[:used].reshape(-1, self.batch)
        return self._order[place].tolist()

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's slices of the batches of `step`, step + 1, ... without end."""
        loader = DataLoader(
            self._samples,
            batch_sampler=_Steps(self, step),
            num_workers=self.workers,
            collate_fn=_collate,
            prefetch_factor=2 if self.workers else None,
            worker_init_fn=_leave_interrupts_to_the_main_process,
        )
        positions = torch.arange(self._slice.start, self._slice.stop)
        for number, loaded in enumerate(loader, start=step):
            if isinstance(loaded, UserError):
                raise loaded
            yield Batch(number, *loaded, positions)


class _Steps:
    """A batch sampler: the sample numbers of one rank, step by step."""

    def __init__(self, stream: TrainStream, first: int):
        self._stream, self._first = stream, first

    def __iter__(self) -> Iterator[list[int]]:
        step = self._first
        while True:
            yield self._stream.ids(step)[self._stream._slice]
            step += 1


class _Samples(Dataset):
    """All samples of some folders by number. A sample that cannot be used is returned as the UserError that says so,
    since an exception would reach the main process wrapped in a worker's traceback."""

    def __init__(self, folders: list[Path], resolution: int):
        self._readers = [reader for folder in folders for reader in open_shards(folder)]
        self._resolution = resolution
        self.shard_sizes = np.array([reader.samples for reader in self._readers], np.int64)
        self._ends = self.shard_sizes.cumsum().tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> tuple[Tensor, str, str] | UserError:
        shard = bisect_right(self._ends, number)
        reader = self._readers[shard]
        sample = reader.get_item(number - self._ends[shard] + reader.samples)
        key, side = sample["key"], self._resolution
        try:
            picture = sample["image"]
            picture = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
            pixels = np.asarray(picture.convert("RGB"))
        except OSError as error:
            return UserError(f"data.streams: {reader.dirname}: the picture of sample {key!r} is broken: {error}")
        if pixels.shape[:2] != (side, side):
            return UserError(
                f"data.resolution: {side} is not what the shards have: sample {key!r} in {reader.dirname} is "
                f"{pixels.shape[1]}x{pixels.shape[0]}"
            )
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1), sample["caption"], key


def _leave_interrupts_to_the_main_process(_worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the main one still wants the batch of the step that it finishes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: list) -> tuple[Tensor, list[str], list[str]] | UserError:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    images, captions, keys = zip(*samples, strict=True)
    return torch.stack(images), list(captions), list(keys)
