"""Image-text pairs as a WebDataset tar: the real photographs where they are at hand, made ones elsewhere."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

REAL = Path(__file__).parents[2] / "shared/data/cc12m_sample.tar"
COUNT = 32


def photographs(folder: Path) -> Path:
    """A tar of 32 photographs with captions."""
    return REAL if REAL.exists() else make_tar(folder / "photographs.tar")


def make_tar(path: Path) -> Path:
    """32 JPEGs of smooth coloured noise, no two alike, of several sizes, with captions."""
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(COUNT):
            coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            encoded = io.BytesIO()
            coarse.resize((280 + 4 * index, 300), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=95)
            for suffix, content in (("jpg", encoded.getvalue()), ("txt", f"a picture of man {index}".encode())):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path
