"""The batches of one data rank: its slice of every step's ordered global batch, read ahead and brought to the device.

The order is `ecdit.data.order`'s, a pure function, so that no state lives in a rank: streaming's StreamingDataset keeps
the set of a global batch when the number of ranks changes, not the order in it, and holds it in shared memory. Samples
are read by streaming's shard readers.

Shapes: `b` samples of this rank.
"""

import itertools
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ecdit.data.cache import CacheSettings
from ecdit.data.encoded import Encoded, read_encoded
from ecdit.data.order import BLOCK, CYCLE, Order, Passes, rows_of_cycle
from ecdit.data.samples import PICTURE_COLUMNS, Samples, SampleSet
from ecdit.data.shards import ShardFolder
from ecdit.data.worker import end_with_parent
from ecdit.errors import UserError
from parallel.philox import key_of, uniform


@dataclass
class Batch:
    """One rank's slice of a step's global batch. positions (b,) int64: the samples' places in the global batch."""

    step: int
    samples: Samples
    positions: Tensor


class TrainStream:
    """Endless batches over the samples of some folders or URLs of shards.

    shares: each source's share of the samples; None: all sources are one set, each sample as frequent as any other.
    nodes: canonical nodes, see `ecdit.data.order`. predownload: samples ahead of the step for which a rank fetches
    shards that are elsewhere. Raises UserError for shards that are missing or damaged, for sources that do not go
    together, and for fewer samples than a batch.
    """

    def __init__(
        self,
        sources: list[Path | str],
        *,
        batch: int,
        resolution: int,
        shares: list[float] | None = None,
        text_tokens: int = 0,
        data_rank: int = 0,
        data_ranks: int = 1,
        nodes: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        workers: int = 0,
        cache: CacheSettings | None = None,
        predownload: int = 0,
    ):
        folders = [ShardFolder(str(source), cache) for source in sources]
        for folder in folders:
            folder.check()
        self.encoded = _common_contents(folders)
        groups = [folders] if shares is None else [[folder] for folder in folders]
        exact = [Fraction(str(share)) for share in shares or [1]]
        exact = [share / sum(exact) for share in exact]
        factor = self.encoded.pictures.factor if self.encoded.pictures else 1
        self._samples = SampleSet(groups, resolution, resolution // factor, text_tokens)
        self._batch, self._seed, self._workers = batch, seed, workers
        self._cached = any(folder.cached for folder in folders)
        self._predownload = predownload
        _check_sizes(groups, exact, batch, nodes, cache)
        self.samples = sum(len(folder) for folder in folders)  # of all sources, once
        passes = [Passes([size for folder in group for size in folder.sizes], nodes, seed, shuffle) for group in groups]
        self._order = Order(passes, exact, batch, nodes, seed)
        size = batch // data_ranks
        self._slice = slice(data_rank * size, (data_rank + 1) * size)

    def choices(self, step: int) -> list[tuple[int, int, float]]:
        """This rank's samples of a step: (group, number in it, the draw that picks a caption)."""
        group, number = self._order.step(step)
        positions = torch.arange(self._slice.start, self._slice.stop)
        draws = uniform(key_of(self._seed, "caption", step), positions, 1)[:, 0]
        return list(zip(group[self._slice].tolist(), number[self._slice].tolist(), draws.tolist(), strict=True))

    def batches(self, step: int, device: torch.device | None = None) -> Iterator[Batch]:
        """This rank's slices of the batches of `step`, step + 1, ... without end, one ahead on the device."""
        on_gpu = device is not None and device.type == "cuda"
        loader = DataLoader(
            self._samples,
            batch_sampler=_Steps(self, step),
            num_workers=self._workers,
            collate_fn=self._samples.collate,
            prefetch_factor=2 if self._workers else None,
            worker_init_fn=_begin,
            pin_memory=on_gpu,
        )
        loaded = iter(loader)  # starts the workers: threads come after them
        fetched = _FetchAhead(self, step, self._predownload) if self._cached else None
        batches = self._numbered(loaded, step, fetched)
        try:
            yield from (_on_device(batches, device) if on_gpu else batches)
        finally:
            if fetched is not None:
                fetched.stop()

    def _numbered(self, loaded: Iterator, first: int, fetched: "_FetchAhead | None") -> Iterator[Batch]:
        positions = torch.arange(self._slice.start, self._slice.stop)
        for step, samples in enumerate(loaded, start=first):
            if isinstance(samples, UserError):
                raise samples
            if fetched is not None:
                fetched.reached(step)
            yield Batch(step, samples, positions)


class _Steps:
    """A batch sampler: the samples of one rank, step by step."""

    def __init__(self, stream: TrainStream, first: int):
        self._stream, self._first = stream, first

    def __iter__(self) -> Iterator[list[tuple[int, int, float]]]:
        step = self._first
        while True:
            yield self._stream.choices(step)
            step += 1


class _FetchAhead:
    """A thread that has the shards of later steps here before they are asked for."""

    def __init__(self, stream: TrainStream, step: int, samples: int):
        self._stream, self._at, self._ended = stream, step, False
        size = stream._slice.stop - stream._slice.start
        self._ahead = max(1, math.ceil(samples / size))
        self._moved = threading.Condition()
        threading.Thread(target=self._run, args=(step,), daemon=True, name="fetch shards").start()

    def reached(self, step: int) -> None:
        """The step that is asked for now."""
        with self._moved:
            self._at = step
            self._moved.notify()

    def stop(self) -> None:
        """Ends the thread after the shard that it fetches."""
        with self._moved:
            self._ended = True
            self._moved.notify()

    def _run(self, step: int) -> None:
        for at in itertools.count(step):
            self._wait_for(at - self._ahead)
            for group, number, _ in self._stream.choices(at):
                if self._ended:
                    return
                folder, index = self._stream._samples.folder_of(group, number)
                try:
                    folder.ensure(folder.shard_of(index))
                except (OSError, UserError):
                    return  # whoever reads the sample meets the same, and tells of it

    def _wait_for(self, step: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._ended or self._at >= step)


def _on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a GPU, one ahead: its copy runs beside the step before."""
    side = torch.cuda.Stream(device)

    def copied(batch: Batch) -> Batch:
        with torch.cuda.stream(side):
            return replace(batch, samples=batch.samples.to(device))

    ahead = copied(next(batches))
    while True:
        torch.cuda.current_stream(device).wait_stream(side)
        now = ahead
        for value in vars(now.samples).values():
            if isinstance(value, Tensor):
                value.record_stream(torch.cuda.current_stream(device))
        ahead = copied(next(batches))
        yield now


def _begin(_worker: int) -> None:
    """In a worker at its start. Ctrl-C reaches all processes of a terminal; the main one still wants the batch of the
    step that it finishes."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _common_contents(folders: list[ShardFolder]) -> Encoded:
    """What the sources' shards hold. Raises UserError where that is not enough, or not the same in all."""
    contents = [_contents(folder) for folder in folders]
    for folder, found in zip(folders, contents, strict=True):
        if found != contents[0]:
            raise UserError(
                f"data.streams: {folder.source} holds {_told(found)}, and {folders[0].source} holds "
                f"{_told(contents[0])}; streams are mixed only where all hold the same"
            )
    return contents[0][2]


def _contents(folder: ShardFolder) -> tuple[str, bool, Encoded]:
    has = set(folder.columns)
    picture = next((column for column in PICTURE_COLUMNS if column in has), None)
    missing = [name for name, there in (("image", picture), ("key", "key" in has)) if not there]
    if not has & {"caption", "captions"}:
        missing.append("caption")
    if missing:
        raise UserError(
            f"data.streams: {folder.source}: the shards have no column {missing[0]!r}; they have "
            f"{', '.join(folder.columns)}; `ecdit prepare` writes what is needed, from MDS shards too"
        )
    encoded = read_encoded(folder.source)
    if (picture != "image" and encoded.pictures is None) or ("text" in has and encoded.text is None):
        raise UserError(
            f"data.streams: {folder.source}: encoded.json is missing or does not say whose latents these are"
        )
    if picture == "image":
        encoded = replace(encoded, pictures=None)  # kept beside latents, they are what is read
    return picture, "text" in has, encoded


def _told(contents: tuple[str, bool, Encoded]) -> str:
    picture, embedded, encoded = contents
    whose = f" of {encoded.pictures.autoencoder}" if encoded.pictures else ""
    text = f"embeddings of {encoded.text.text_encoder}" if embedded else "captions"
    return f"{'pictures' if picture == 'image' else 'latents'}{whose} with {text}"


def _check_sizes(
    groups: list[list[ShardFolder]], shares: list[Fraction], batch: int, nodes: int, cache: CacheSettings | None
) -> None:
    needed, counts = 0.0, rows_of_cycle(shares)
    for group, share, rows in zip(groups, shares, counts, strict=True):
        samples, name = sum(len(folder) for folder in group), group[0].source
        if not rows:
            raise UserError(f"data.streams: {name}: a proportion of {float(share):.2g} is under one in {CYCLE}")
        if share * batch > samples:
            raise UserError(
                f"train.batch: {batch} is more than the {samples} samples of data.streams; "
                f"try at most {int(samples / share)}"
            )
        if min(np.sum(folder.sizes) for folder in group) < nodes:
            raise UserError(f"data.canonical_nodes: {nodes} is more than the {samples} samples of {name}")
        total = sum(folder.bytes for folder in group if folder.cached)
        needed += min(total, 1.25 * BLOCK * total / samples)
    if cache is not None and cache.limit is not None and needed > cache.limit:
        raise UserError(
            f"data.cache.limit: {cache.limit / 2**30:.3g} GiB do not hold the shards that are read at a time, over "
            f"which {BLOCK} samples are shuffled; at least {math.ceil(10 * needed / 2**30) / 10:g}"
        )
