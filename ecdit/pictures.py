"""Pictures as files: single PNGs that carry their prompt, and labelled grids.

Shapes: `N` pictures of `R` pixels a side.
"""

import re
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ecdit.recipe import SampleRecipe
from ecdit.sampling import Samples

CELL = 128  # side of a picture in a grid; smaller pictures are enlarged to it by whole factors
GAP, LABEL = 6, 20


def write_pictures(samples: Samples, folder: Path, settings: SampleRecipe, source: str) -> list[Path]:
    """One PNG a sample, named by prompt and seed; prompt, seed and settings stand in its text chunks."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for image, prompt, seed in zip(samples.images, samples.prompts, samples.seeds, strict=True):
        info = PngInfo()
        text = {"prompt": prompt, "seed": seed, "source": source, **settings.model_dump()}
        for key, value in text.items():
            info.add_itxt(key, str(value))
        path = folder / f"{slug(prompt)}-{seed}.png"
        Image.fromarray(image.numpy()).save(path, pnginfo=info)
        paths.append(path)
    return paths


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
    """A file name for a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


def _fit(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont, width: int) -> str:
    while len(text) > 1 and pen.textlength(text, font=font) > width:
        text = text[:-2] + "…"
    return text
