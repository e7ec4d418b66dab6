"""Pictures as files: single PNGs that carry what they were drawn from, and labelled grids.

Shapes: `N` pictures of `R` pixels a side.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
import xxhash
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ecdit.whole import whole

CELL = 128  # side of a picture in a grid; smaller pictures are enlarged to it by whole factors
GAP, LABEL = 6, 20


def save_picture(image: Tensor, path: Path, text: dict[str, str]) -> None:
    """A PNG (R, R, 3) uint8 with `text` in its text chunks, whole or not at all."""
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    with whole(path) as aside:
        Image.fromarray(image.numpy()).save(aside, "PNG", pnginfo=info)


def read_text(path: Path) -> dict[str, str]:
    """The text chunks of a picture; none where there is no such picture, or it is damaged."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return dict(picture.text)
    except (OSError, SyntaxError, AttributeError):  # what PIL raises for a broken PNG; other kinds have no text
        return {}


def read_pixels(path: Path) -> Tensor:
    """(R, R, 3) uint8."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB")))


def digest(path: Path) -> str:
    """xxh64 of a picture's pixels: the same wherever it was drawn."""
    return xxhash.xxh64(read_pixels(path).numpy().tobytes()).hexdigest()


def grid(images: Tensor, labels: list[str], columns: int) -> Image.Image:
    """images (N, R, R, 3), row by row, `columns` in a row; each row under its label."""
    scale = max(1, CELL // images.shape[1])
    cell = images.shape[1] * scale
    rows = -(-len(images) // columns)
    width, height = columns * (cell + GAP) + GAP, rows * (cell + GAP + LABEL) + GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top = GAP + row * (cell + GAP + LABEL)
        if column == 0:
            pen.text((GAP, top), _fit(labels[row], pen, font, width - 2 * GAP), fill="black", font=font)
        enlarged = Image.fromarray(image.numpy()).resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (GAP + column * (cell + GAP), top + LABEL))
    return sheet


def slug(prompt: str) -> str:
    """A file name for a prompt, which no other prompt has: its words, and a digest where these do not tell all."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    if words and words.replace("-", " ") == prompt:
        return words
    return f"{words[:47]}-{hashlib.blake2b(prompt.encode(), digest_size=6).hexdigest()}".lstrip("-")


def _fit(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont, width: int) -> str:
    """On one line, cut where it is too long."""
    text = " ".join(text.split())
    while len(text) > 1 and pen.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text
