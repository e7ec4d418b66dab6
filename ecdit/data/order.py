"""The ordered global batch: which samples a step has, in which order, as a function of (data, seed, step) alone.

Any step's order is computed by itself, in memory that does not grow with the data, so that resuming is asking for
another step, and a billion samples need no table. Ranks and workers play no part.

Shapes: `B` samples of a global batch, `W` canonical nodes, `P = B / W` of each; a *row* holds one sample of each.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ecdit.data.streaming_import import get_shuffle

SHUFFLE = "py1e"  # streaming's default: samples of nearby shards mix, so that shards are read one after the other
BLOCK = 1 << 18  # samples over which py1e spreads a shard
SEGMENT = 1 << 22  # samples that are put into order at once
CYCLE = 10_000  # rows after which the pattern of the streams repeats: shares are exact to one in so many


class Passes:
    """One stream's samples, pass after pass, each pass in another order.

    Its shards are dealt at random into segments of about `segment` samples, always the same; a pass takes the segments
    in another order and shuffles each. In a segment every canonical node has its own part. As many samples of a
    segment as do not fill a row are left out of a pass: fewer than W, and other ones each time.
    """

    def __init__(self, shard_sizes: Sequence[int], nodes: int, seed: int, shuffle: bool, segment: int = SEGMENT):
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.concatenate([[0], self._sizes.cumsum()])
        self._nodes, self._seed, self._shuffle = nodes, seed, shuffle
        self._segments = self._deal(segment)
        self._rows = np.array([self._sizes[shards].sum() // nodes for shards in self._segments])
        self.rows_of_a_pass = int(self._rows.sum())
        self._ordered = lru_cache(maxsize=2)(self._order_segment)  # a batch may lie across two

    def _deal(self, segment: int) -> list[NDArray[np.int64]]:
        """Shard numbers of every segment; one that would be too small for a row joins its neighbour."""
        count = max(1, int(self._starts[-1]) // segment)
        if count == 1 or not self._shuffle:
            return [np.arange(len(self._sizes))]
        dealt = np.random.default_rng([self._seed, 1]).permutation(len(self._sizes))
        places = self._sizes[dealt].cumsum() * count // (int(self._starts[-1]) + 1)
        cuts = np.flatnonzero(np.diff(places)) + 1
        return [np.sort(shards) for shards in np.split(dealt, cuts)]

    def rows(self, first: int, stop: int) -> NDArray[np.int64]:
        """Rows first ... stop - 1 of the endless sequence, as sample numbers: (stop - first, W)."""
        found, row = [np.empty((0, self._nodes), np.int64)], first
        while row < stop:
            number, offset = divmod(row, self.rows_of_a_pass)
            for segment in self._order_of_segments(number):
                length = int(self._rows[segment])
                if offset < length:
                    found.append(self._ordered(number, segment)[offset : offset + stop - row])
                    row += len(found[-1])
                    if row == stop:
                        break
                offset = max(0, offset - length)
        return np.concatenate(found)

    def _order_of_segments(self, number: int) -> list[int]:
        count = len(self._segments)
        return np.random.default_rng([self._seed, 2, number]).permutation(count).tolist() if count > 1 else [0]

    def _order_segment(self, number: int, segment: int) -> NDArray[np.int64]:
        shards, rows = self._segments[segment], int(self._rows[segment])
        spans = [np.arange(self._starts[shard], self._starts[shard + 1]) for shard in shards]
        samples = np.concatenate(spans)
        if self._shuffle:
            block = max(BLOCK, int(2 * self._sizes.max()))  # py1e leaves a shard larger than its block in order
            samples = samples[get_shuffle(SHUFFLE, self._sizes[shards], self._nodes, self._seed, number, block)]
        bounds = [len(samples) * node // self._nodes for node in range(self._nodes)]
        return np.stack([samples[begin : begin + rows] for begin in bounds], axis=1)


class Order:
    """The global batches of several streams in given shares.

    Which row of a batch comes from which stream follows a fixed random pattern of CYCLE rows, in which each stream has
    its share exactly; a stream goes through its own samples pass by pass, so that none is seen again before all are.
    """

    def __init__(self, streams: list[Passes], shares: list[Fraction], batch: int, nodes: int, seed: int):
        self._streams, self._batch, self._nodes = streams, batch, nodes
        counts = rows_of_cycle(shares)
        pattern = np.repeat(np.arange(len(streams)), counts)
        self._pattern = np.random.default_rng([seed, 3]).permutation(pattern) if len(streams) > 1 else pattern
        taken = self._pattern[:, None] == np.arange(len(streams))
        self._before = np.concatenate([np.zeros((1, len(streams)), np.int64), taken.cumsum(0)])  # rows of each so far

    def step(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ordered global batch of a step: the stream of each sample (B,), and its number in that (B,)."""
        rows = self._batch // self._nodes
        first, stop = step * rows, (step + 1) * rows
        stream = self._pattern[np.arange(first, stop) % CYCLE]
        number = np.empty((rows, self._nodes), np.int64)
        for index, passes in enumerate(self._streams):
            number[stream == index] = passes.rows(self._rows_before(first, index), self._rows_before(stop, index))
        return np.tile(stream, self._nodes), number.T.reshape(-1)

    def _rows_before(self, row: int, stream: int) -> int:
        cycles, rest = divmod(row, CYCLE)
        return cycles * int(self._before[-1, stream]) + int(self._before[rest, stream])


def rows_of_cycle(shares: list[Fraction]) -> list[int]:
    """Rows of a cycle for each share, by largest remainder: they add up to CYCLE."""
    exact = [share * CYCLE for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: exact[i] - counts[i], reverse=True)
    for index in by_remainder[: CYCLE - sum(counts)]:
        counts[index] += 1
    return counts
