"""torch's distributed checkpointing on files, with its index written as JSON: reading a checkpoint unpickles nothing.

torch pickles the index; here `index.json` says of every tensor its type and whole shape, and of every box where it
lies in the tensor and in which file. The boxes themselves are read with torch's `weights_only`.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from parallel.checkpoint import CheckpointError

INDEX = "index.json"


class Saving(DefaultSavePlanner):
    """Finds a rank's boxes."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class Loading(DefaultLoadPlanner):
    """Finds a rank's boxes, or whole tensors."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # torch's own goes through the values, to materialise those on the meta device, and drops types it does not know
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held = self.state_dict[index.fqn]
        return held if isinstance(held, Tensor) else held.__get_tensor_shard__(index)


class Writer(FileSystemWriter):
    """Writes each rank's boxes to a file of its own, synced to the disk, and the index at the end."""

    def __init__(self, folder: Path):
        super().__init__(folder, sync_files=True)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called by the coordinating rank when all have written."""
        places = {(r.index.fqn, r.index.offset): r.storage_data for rank in results for r in rank}
        index = {}
        for name, tensor in sorted(metadata.state_dict_metadata.items()):
            boxes = [_describe(chunk, places[name, chunk.offsets]) for chunk in tensor.chunks]
            dtype = str(tensor.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": list(tensor.size), "boxes": boxes}
        with (Path(self.path) / INDEX).open("w", encoding="utf-8") as file:
            json.dump(index, file)
            file.flush()
            os.fsync(file.fileno())


class Reader(FileSystemReader):
    """Reads what `Writer` wrote. Raises CheckpointError for an index that is damaged or points elsewhere."""

    def read_metadata(self) -> Metadata:
        """The index, in torch's form."""
        tensors, places = {}, {}
        for name, tensor in read_index(Path(self.path)).items():
            chunks = []
            for box in tensor["boxes"]:
                chunk = ChunkStorageMetadata(torch.Size(box["offset"]), torch.Size(box["shape"]))
                chunks.append(chunk)
                places[MetadataIndex(name, chunk.offsets)] = _StorageInfo(box["file"], *box["bytes"])
            properties = TensorProperties(dtype=getattr(torch, tensor["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor["shape"]), chunks)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))


def read_index(folder: Path) -> dict[str, Any]:
    """`index.json` of a checkpoint. Raises CheckpointError where it is damaged or names a file outside the folder."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = {box["file"] for tensor in index.values() for box in tensor["boxes"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} cannot be read: {error}") from None
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{folder / INDEX} names {name!r}, which is outside the checkpoint")
    return index


def _describe(chunk: ChunkStorageMetadata, place: _StorageInfo) -> dict[str, Any]:
    return {
        "offset": list(chunk.offsets),
        "shape": list(chunk.sizes),
        "file": place.relative_path,
        "bytes": [place.offset, place.length],
    }
