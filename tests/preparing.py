"""What tests of `ecdit prepare` share: a preparation of small pictures, and what it left."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ecdit.data.prepare import Settings, prepare
from ecdit.data.shards import ShardFolder

COUNT, RESOLUTION = 30, 32
# the same for the command
OPTIONS = ["--resolution", str(RESOLUTION), "--min-side", "16", "--part", "7", "--shard-size", "1"]


def run(source, out, *, workers=1, **more) -> ShardFolder:
    settings = {"resolution": RESOLUTION, "min_side": 16, "part": 7, "shard_mib": 1} | more
    prepare(Settings(source=str(source), **settings), out, workers=workers)
    return ShardFolder(str(out))


def samples_of(folder: ShardFolder) -> list[dict]:
    return [folder.sample(number) for number in range(len(folder))]


def report(out: Path) -> dict[str, dict]:
    return {note["key"]: note for note in map(json.loads, (out / "report.jsonl").read_text().splitlines())}


def plain(picture: bytes) -> np.ndarray:
    """The centre crop, as anyone would make it."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((RESOLUTION,) * 2, Image.Resampling.LANCZOS, box=box)).astype(int)


def check_round_trip(pairs, folder: ShardFolder) -> None:
    found = samples_of(folder)
    assert sorted(sample["captions"][0] for sample in found) == sorted(caption for _, caption in pairs.values())
    assert len({sample["key"] for sample in found}) == len(pairs)
    by_caption = {caption: picture for picture, caption in pairs.values()}
    for sample in found:
        decoded = np.asarray(Image.open(io.BytesIO(sample["image"]))).astype(int)
        assert np.abs(decoded - plain(by_caption[sample["captions"][0]])).mean() < 3


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(size=(48, 40), mode="RGB", color="red", kind="JPEG", **options) -> bytes:
    return encoded(Image.new(mode, size, color), kind, **options)


def pixels(sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample["image"])))
