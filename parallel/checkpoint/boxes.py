"""What a rank has of a tensor, as boxes of the whole one: the form in which any layout reads what any other wrote.

A rank's slice of a flat buffer cuts a tensor anywhere; in the tensor's own shape it is a few boxes: the end of a row,
whole rows, the beginning of a row, in as many dimensions as there are.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Shape = tuple[int, ...]


class Boxes:
    """This rank's boxes of one tensor, for torch's distributed checkpointing (its `_Checkpointable` protocol).

    `parts`: (offset of the box in the whole tensor, its values, a view that loading writes into).
    """

    def __init__(self, whole: Shape, parts: list[tuple[Shape, Tensor]]):
        self.whole, self.parts = whole, parts

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return torch.Size(self.whole)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's boxes."""
        return sum(values.numel() * values.element_size() for _, values in self.parts)

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(values), size=self.size()
                ),
            )
            for chunk, (_, values) in zip(self.__create_chunk_list__(), self.parts, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), values.shape) for offset, values in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(values for offset, values in self.parts if torch.Size(offset) == index.offset)


def boxes_of(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """(offset, size) of the boxes that elements start ... stop - 1 of a flattened tensor are, in their order."""
    if len(shape) <= 1:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row = start // inner
        if start % inner == 0 and stop - start >= inner:  # whole rows
            rows = (stop - start) // inner
            yield (row,) + (0,) * (len(shape) - 1), (rows, *shape[1:])
            start += rows * inner
        else:
            end = min(stop, (row + 1) * inner)
            for offset, size in boxes_of(shape[1:], start - row * inner, end - row * inner):
                yield (row, *offset), (1, *size)
            start = end


def view_as_boxes(offset: Shape, shape: Shape, start: int, values: Tensor) -> list[tuple[Shape, Tensor]]:
    """Parts for `Boxes` from flat `values` that begin at element `start` of a block of this shape and offset."""
    parts, taken = [], 0
    for at, size in boxes_of(shape, start, start + len(values)):
        count = math.prod(size)
        place = tuple(o + a for o, a in zip(offset, at, strict=True))
        parts.append((place, values[taken : taken + count].view(size)))
        taken += count
    return parts
