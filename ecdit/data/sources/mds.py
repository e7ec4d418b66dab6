"""MDS shards, ours or another tool's: a column of pictures and one of captions."""

from collections.abc import Iterator
from dataclasses import dataclass

from ecdit.data.shards import ShardFolder
from ecdit.data.sources.pair import Columns, Fault, Pair, Part, listed
from ecdit.errors import UserError


@dataclass(frozen=True)
class MdsPart:
    """Samples first ... first + size - 1 of the shards of a folder."""

    folder: str
    columns: Columns
    first: int
    size: int
    name: str
    counted: bool = True

    def pairs(self) -> Iterator[Pair | Fault]:
        shards = ShardFolder(self.folder)
        for number in range(self.first, self.first + self.size):
            try:
                sample = shards.sample(number)
            except (UserError, OSError, ValueError, IndexError) as error:
                yield Fault(f"{self.folder}/{number}", "broken shard", str(error))
                continue
            caption = sample.get(self.columns.caption, sample.get("captions"))
            yield Pair(str(sample.get("key", number)), sample.get(self.columns.image), listed(caption))


def parts(folder: str, columns: Columns, pairs: int) -> list[Part]:
    """Its samples in ranges. Raises UserError where the index cannot be read or has no such columns."""
    shards = ShardFolder(folder)
    has = set(shards.columns)
    if columns.image not in has:
        raise UserError(f"{folder}: no column {columns.image!r}; it has {', '.join(sorted(has))}")
    if not has & {columns.caption, "captions"}:
        raise UserError(f"{folder}: no column {columns.caption!r}; it has {', '.join(sorted(has))}")
    return [
        MdsPart(folder, columns, first, min(pairs, len(shards) - first), f"{folder} from sample {first}")
        for first in range(0, len(shards), pairs)
    ]
