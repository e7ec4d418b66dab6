"""Pictures small enough for a page that is kept in a repository."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from ecdit.report.figures import data_uri

COLORS = 64  # of a heat map, which has a colour map and a grey picture
GREEN, RED = "#1a7f37", "#cf222e"
FRAME = 2


def right_or_wrong(path: Path, *, right: bool) -> str:
    """The picture in a green or a red frame, as a data URI."""
    with Image.open(path) as picture:
        framed = ImageOps.expand(picture.convert("RGB"), FRAME, GREEN if right else RED)
    return _png(framed)


def heatmap(path: Path) -> str:
    """With fewer colours, as a data URI."""
    with Image.open(path) as picture:
        return _png(picture.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE))


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return data_uri("image/png", file.getvalue())
