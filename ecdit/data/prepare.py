"""Any source of image-text pairs to MDS shards: the embedded shapes, WebDataset tars, image folders, parquet files."""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ecdit.data.shapes import as_json, make
from ecdit.data.shards import INDEX, write_shards
from ecdit.errors import UserError

SETTINGS = "prepare.json"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
JPEG_QUALITY = 95
DEFAULT_RESOLUTION = 256
NAMED = 5  # skipped samples that the summary names


@dataclass
class Pair:
    """A picture as the source has it, its caption and its name; None where the source lacks one."""

    key: str
    picture: bytes | None
    caption: str | None


def prepare(source: str, out: Path, *, resolution: int | None, count: int, seed: int) -> None:
    """Writes the shards of `source` to the folder `out`, which is whole or absent.

    Asked again for what is there already, it does nothing. Raises UserError for a source that is absent, of an
    unknown kind or without a usable pair, and for an `out` that holds something else.
    """
    if source == "shapes":
        settings = {"source": source, "count": count, "seed": seed}
    else:
        path = Path(source)
        if not path.exists():
            raise UserError(f"{source}: no such file or folder; valid: shapes, a .tar, a folder, a .parquet file")
        settings = {"source": str(path.resolve()), "resolution": resolution or DEFAULT_RESOLUTION}
    if _already_there(out, settings):
        _say(f"{out} is there already.")
        return
    extra = {SETTINGS: json.dumps(settings, indent=1) + "\n"}
    if source == "shapes":
        columns = {"image": "png", "caption": "str", "key": "str", "scene": "json"}
        written = write_shards(_shapes(count, seed), out, columns, extra)
    else:
        crops = _Crops(_pairs(path), settings["resolution"])
        columns = {"image": "bytes", "caption": "str", "key": "str"}
        written = write_shards(crops, out, columns, extra)
        crops.report()
    _say(f"{written} samples in {out}.")


def _already_there(out: Path, settings: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    found = None
    if (out / INDEX).exists() and (out / SETTINGS).exists():
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    if found != settings:
        held = f"shards of {found}" if found else "something else"
        raise UserError(f"{out}: holds {held}; asked for {settings}: choose another folder, or remove this one")
    return True


def _shapes(count: int, seed: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        sample = make(seed, index)
        yield {
            "image": Image.fromarray(sample.image),
            "caption": sample.caption,
            "key": f"shapes-{seed}-{index}",
            "scene": as_json(sample.scene),
        }


class _Crops:
    """Samples from pairs: centre crops of one resolution. Pairs that are no good are counted and left out."""

    def __init__(self, pairs: Iterator[Pair], resolution: int):
        self._pairs, self._resolution = pairs, resolution
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        good = 0
        for pair in self._pairs:
            try:
                sample = self._sample(pair)
            except ValueError as error:
                self.skipped.append(f"{pair.key}: {error}")
                continue
            good += 1
            yield sample
        if not good:
            raise UserError("no usable pair in this source" + "".join(f"\n  {s}" for s in self.skipped[:NAMED]))

    def _sample(self, pair: Pair) -> dict[str, Any]:
        if pair.picture is None:
            raise ValueError("no picture")
        if not (pair.caption or "").strip():
            raise ValueError("no caption")
        return {
            "image": centre_crop(pair.picture, self._resolution),
            "caption": pair.caption.strip(),
            "key": pair.key,
        }

    def report(self) -> None:
        if self.skipped:
            _say(f"{len(self.skipped)} samples were left out:")
            for reason in self.skipped[:NAMED]:
                _say(f"  {reason}")


def centre_crop(data: bytes, side: int) -> bytes:
    """The largest square in the middle, resized (Lanczos), as a JPEG file. Raises ValueError for no picture."""
    try:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"broken picture: {error}") from None
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    box = (left, top, left + short, top + short)
    resized = picture.resize((side, side), Image.Resampling.LANCZOS, box=box)
    coded = io.BytesIO()
    resized.save(coded, "JPEG", quality=JPEG_QUALITY)
    return coded.getvalue()


def _pairs(path: Path) -> Iterator[Pair]:
    if path.suffix == ".tar":
        return _from_tar(path)
    if path.suffix == ".parquet":
        return _from_parquet(path)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        return (pair for tar in tars for pair in _from_tar(tar)) if tars else _from_folder(path)
    raise UserError(f"{path}: not a source that is known; valid: shapes, a .tar, a folder, a .parquet file")


def _from_tar(path: Path) -> Iterator[Pair]:
    """WebDataset: files of one sample share the name up to the first dot, and follow each other."""
    pair: Pair | None = None
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if pair is None or pair.key != key:
                    if pair is not None:
                        yield pair
                    pair = Pair(key, None, None)
                if f".{ending.lower()}" in PICTURES:
                    pair.picture = archive.extractfile(member).read()
                elif ending == "txt":
                    pair.caption = archive.extractfile(member).read().decode("utf-8", "replace")
    except tarfile.TarError as error:
        raise UserError(f"{path}: cannot be read as a tar archive: {error}") from None
    if pair is not None:
        yield pair


def _from_folder(path: Path) -> Iterator[Pair]:
    """Pictures with a .txt of the same name beside them, in the order of their names."""
    for picture in sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES):
        caption = picture.with_suffix(".txt")
        text = caption.read_text(encoding="utf-8", errors="replace") if caption.exists() else None
        yield Pair(picture.relative_to(path).with_suffix("").as_posix(), picture.read_bytes(), text)


def _from_parquet(path: Path) -> Iterator[Pair]:
    """Columns `image` (bytes, or a struct with `bytes`) and `caption`."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet files need the package pyarrow; install it") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read as a parquet file: {error}") from None
    missing = {"image", "caption"} - set(table.schema_arrow.names)
    if missing:
        raise UserError(f"{path}: no column {sorted(missing)[0]!r}; it has {', '.join(table.schema_arrow.names)}")
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=["image", "caption"]):
        for record in batch.to_pylist():
            picture = record["image"]
            yield Pair(str(row), picture["bytes"] if isinstance(picture, dict) else picture, record["caption"])
            row += 1


def _say(message: str) -> None:
    print(message, file=sys.stderr)
