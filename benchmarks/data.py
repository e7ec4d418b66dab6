"""The loader against plain loops over the same files, and against what a GPU needs.

One process each, so a rate is a core's. The plain loops read the same JPEG files from memory and do nothing else:
`PIL` opens and converts them, `torchvision` decodes them where it can be imported; for latents it is a loop that makes
tensors of the same bytes. The last rows are the time that a step of XL-8E gives each image on an H200.
"""

import io
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Row, compare
from ecdit.data.encoded import Encoded, EncodedPictures, EncodedText, empty_as_text, to_bits
from ecdit.data.shards import ShardFolder, write_shards
from ecdit.data.stream import TrainStream
from ecdit.model.count import forward_flops
from ecdit.recipe_io import parse_recipe
from launcher.plan.gpus import GPUS

IMAGES, BATCH, ROUNDS = 2048, 64, 7
SIDE, CHANNELS, FACTOR, TOKENS, TEXT_WIDTH = 256, 4, 8, 24, 2048
PHOTOGRAPHS = Path("../shared/data/cc12m_sample.tar")
MFU = 0.5


def rows() -> list[Row]:
    """Milliseconds are of one image, in one process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-data-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = _jpeg(Path(folder)) + _latents(Path(folder))
    finally:
        torch.set_num_threads(before)
    return found + _needed({row.name: row.milliseconds for row in found})


def _jpeg(folder: Path) -> list[Row]:
    files = _files()
    samples = ({"key": str(i), "captions": ["a caption"], "image": files[i % len(files)]} for i in range(IMAGES))
    write_shards(samples, folder / "jpeg", {"key": "str", "captions": "json", "image": "bytes"})
    stream = TrainStream([folder / "jpeg"], batch=BATCH, resolution=SIDE)
    ours, plain, vision = "loader, 256x256 JPEG", "PIL, plain loop", "torchvision, plain loop"
    peers = {plain: lambda file: np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))}
    decode = _torchvision()
    if decode:
        peers[vision] = decode
    return _per_image(
        {ours: stream}, {name: (files, peer) for name, peer in peers.items()}, {ours: plain, vision: plain}
    )


def _latents(folder: Path) -> list[Row]:
    noise = np.random.default_rng(0)
    shape = (CHANNELS, SIDE // FACTOR, SIDE // FACTOR)
    latent = noise.standard_normal(shape).astype(np.float16)
    text = to_bits(torch.randn(TOKENS, TEXT_WIDTH))
    pictures = EncodedPictures("none", "posterior", CHANNELS, FACTOR, 1.0, 0.0)
    encoded = Encoded(pictures, EncodedText("none", TEXT_WIDTH, TOKENS, empty_as_text(torch.zeros(1, TEXT_WIDTH))))
    columns = {"key": "str", "captions": "json", "latent_mean": "ndarray:float16", "latent_logvar": "ndarray:float16"}
    columns |= {"text": "ndarray:uint16", "text_tokens": "ndarray:int32"}
    sample = {"captions": ["a caption"], "latent_mean": latent, "latent_logvar": latent, "text": text}
    sample["text_tokens"] = np.array([TOKENS], np.int32)
    write_shards(({"key": str(i)} | sample for i in range(IMAGES)), folder / "latents", columns)
    (folder / "latents/encoded.json").write_text(encoded.as_json())
    stream = TrainStream([folder / "latents"], batch=BATCH, resolution=SIDE, text_tokens=TOKENS)
    raw = [(latent.tobytes() * 2, text.tobytes())] * 256

    def tensors(item: tuple[bytes, bytes]) -> list[torch.Tensor]:
        return [torch.frombuffer(bytearray(data), dtype=torch.int16).clone() for data in item]

    ours, plain = "loader, latents and text embeddings", "bytes to tensors, plain loop"
    return _per_image({ours: stream}, {plain: (raw, tensors)}, {ours: plain})


def _per_image(streams: dict, loops: dict, against: dict[str, str]) -> list[Row]:
    """Times BATCH images of each in turn."""
    functions: dict[str, Callable[[], object]] = {}
    for name, stream in streams.items():
        functions[name] = _next_of(stream.batches(0))
    for name, (items, work) in loops.items():
        functions[name] = _loop(items, work)
    return [
        Row(row.name, row.milliseconds / BATCH, row.against, row.ratio) for row in compare(functions, against, ROUNDS)
    ]


def _next_of(batches: Iterator) -> Callable[[], object]:
    return lambda: next(batches)


def _loop(items: list, work: Callable) -> Callable[[], object]:
    return lambda: [work(items[i % len(items)]) for i in range(BATCH)]


def _files() -> list[bytes]:
    """JPEG files of 256x256: the photographs' where they are at hand, made ones elsewhere."""
    from ecdit.data.prepare import Settings, prepare

    if PHOTOGRAPHS.exists():
        with tempfile.TemporaryDirectory() as folder:
            prepare(Settings(str(PHOTOGRAPHS.resolve())), Path(folder, "out"), workers=1)
            shards = ShardFolder(str(Path(folder, "out")))
            return [shards.sample(number)["image"] for number in range(len(shards))]
    print("made pictures, for there are no photographs", file=sys.stderr)
    coarse = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    files = []
    for pixels in coarse:
        file = io.BytesIO()
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    return files


def _torchvision() -> Callable[[bytes], torch.Tensor] | None:
    from ecdit.data.torchvision_guard import hide_broken_torchvision

    hide_broken_torchvision()
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        print("torchvision cannot be imported; PIL's plain loop stands alone", file=sys.stderr)
        return None
    try:
        decode_jpeg(torch.frombuffer(bytearray(_files()[0]), dtype=torch.uint8))
    except RuntimeError as error:
        print(f"torchvision cannot decode JPEG: {error}", file=sys.stderr)
        return None
    return lambda file: decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8))


def _needed(measured: dict[str, float]) -> list[Row]:
    """An image's time in a step of XL-8E at MFU on an H200; the ratio is the cores that keep one GPU fed."""
    values = {
        "run": "bench", "model": {"size": "XL", "experts": 8}, "train": {"batch": 64, "micro_batch": 8},
        "data": {"streams": [{"path": "none"}], "autoencoder": "any", "text_encoder": "any"},
    }  # fmt: skip
    model = parse_recipe(values, "the benchmark").model
    flops = 3 * forward_flops(model, model.tokens // 2)
    wanted = 1e3 * flops / (MFU * GPUS["h200"].bf16)
    found = [Row(f"a step of XL-8E, half masked, {MFU:.0%} MFU on an H200", wanted)]
    for name in (name for name in measured if name.startswith("loader")):
        found.append(Row(f"cores a GPU: {name}", measured[name], found[0].name, measured[name] / wanted))
    return found
