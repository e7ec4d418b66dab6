"""Whole tensors of a checkpoint as safetensors: in one file, or in several of which one at a time is in memory."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ecdit.dtypes import DTYPES
from ecdit.errors import UserError
from ecdit.run import Run
from ecdit.whole import whole
from parallel.checkpoint.folder import Checkpoint

KINDS = ("ema", "weights")
SHARD_BYTES = 5 * 10**9


def checkpoint_of(run: Run) -> Checkpoint:
    """The newest one that verifies. Raises UserError where there is none, or no run."""
    run.recipe()
    return run.newest_checkpoint()


def write_file(saved: Checkpoint, kind: str, dtype: str, file: Path) -> None:
    """All tensors of one kind, by parameter; the step and the recipe stand in the file."""
    with whole(file) as aside:
        _save(saved, kind, list(saved.shapes(kind)), dtype, aside, _facts(saved))


def write_shards(saved: Checkpoint, kind: str, dtype: str, folder: Path, stem: str) -> None:
    """The same in files of about SHARD_BYTES each, with an index, as diffusers reads them: STEM.safetensors, or
    STEM-00001-of-0000N.safetensors and STEM.safetensors.index.json."""
    shapes, width = saved.shapes(kind), DTYPES[dtype].itemsize
    parts: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * width
        if parts[-1] and filled + size > SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    if len(parts) == 1:
        _save(saved, kind, parts[0], dtype, folder / f"{stem}.safetensors", _facts(saved))
        return
    places = {}
    for number, names in enumerate(parts, start=1):
        file = f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
        _save(saved, kind, names, dtype, folder / file, _facts(saved))
        places |= dict.fromkeys(names, file)
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * width
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _save(saved: Checkpoint, kind: str, names: list[str], dtype: str, file: Path, facts: dict[str, str]) -> None:
    tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in saved.kind(kind, names).items()}
    try:
        save_file(tensors, file, metadata=facts)
    except SafetensorError as error:  # of a full disk too
        raise UserError(f"--out: {file}: cannot be written: {error}") from None
    follow_umask(file)


def follow_umask(file: Path) -> None:
    """Lets others read a file that a library has made private, as the user's umask has it for any other file:
    safetensors writes through a temporary one, which nobody else may open."""
    mask = os.umask(0o077)  # the only way to ask is to set it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def _facts(saved: Checkpoint) -> dict[str, str]:
    return {"format": "pt", "step": str(saved.step), "recipe": saved.meta["recipe"]}
