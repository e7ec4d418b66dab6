"""Generated collections of image-text pairs, written as every kind of source."""

import functools
import http.server
import io
import json
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ecdit.data.shards import write_shards

SIDE = (48, 40)


def make_pairs(count: int) -> dict[str, tuple[bytes, str]]:
    """Key -> a JPEG of smooth colours, no two alike, and a caption with what captions may hold."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    pairs = {}
    for index in range(count):
        file = io.BytesIO()
        Image.fromarray(coarse[index]).resize(SIDE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        pairs[f"{index:06d}"] = file.getvalue(), f" caption {index}: naïve “quotes” 雪\n"
    return pairs


def as_tar(pairs, path: Path, mode: str = "w") -> Path:
    """A WebDataset tar."""
    with tarfile.open(path, mode) as tar:
        for key, (picture, caption) in pairs.items():
            for ending, data in (("jpg", picture), ("txt", caption.encode())):
                entry = tarfile.TarInfo(f"{key}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def as_folder(pairs, path: Path) -> Path:
    """Pictures with a .txt beside each, in two folders."""
    for index, (key, (picture, caption)) in enumerate(pairs.items()):
        folder = path / f"half-{index * 2 // len(pairs)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{key}.jpg").write_bytes(picture)
        (folder / f"{key}.txt").write_bytes(caption.encode())
    return path


def as_listed(pairs, path: Path) -> Path:
    """Pictures, and one captions.jsonl."""
    path.mkdir(parents=True)
    lines = []
    for key, (picture, caption) in pairs.items():
        (path / f"{key}.jpg").write_bytes(picture)
        lines.append(json.dumps({"file_name": f"{key}.jpg", "caption": caption}) + "\n")
    (path / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


def as_parquet(pairs, path: Path) -> Path:
    """A parquet file with several row groups, pictures as structs of bytes."""
    import pyarrow
    import pyarrow.parquet

    rows = {"image": [{"bytes": p, "path": None} for p, _ in pairs.values()], "caption": [c for _, c in pairs.values()]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path, row_group_size=max(1, len(pairs) // 3))
    return path


def as_parquet_of_paths(pairs, path: Path) -> Path:
    """A parquet file that names the pictures beside it."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    for key, (picture, _) in pairs.items():
        (path.parent / f"{key}.jpg").write_bytes(picture)
    rows = {"image": [f"{key}.jpg" for key in pairs], "caption": [c for _, c in pairs.values()]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    return path


def as_mds(pairs, path: Path) -> Path:
    """Another tool's MDS shards, compressed."""
    samples = ({"image": p, "caption": c} for p, c in pairs.values())
    write_shards(samples, path, {"image": "bytes", "caption": "str"}, shard_bytes=20_000, compression="zstd")
    return path


KINDS = {
    "set.tar": as_tar,
    "set.tar.gz": lambda pairs, path: as_tar(pairs, path, "w:gz"),
    "folder": as_folder,
    "listed": as_listed,
    "set.parquet": as_parquet,
    "paths/set.parquet": as_parquet_of_paths,
    "mds": as_mds,
}


@contextmanager
def served(folder: Path, seen: list[str] | None = None):
    """The folder on an HTTP server of this machine; yields its URL. seen: takes every path that is asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            if seen is not None:
                seen.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
