"""A picture's file, of any size and kind, to a square crop of one size: what can be made of it, and what cannot."""

import io
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from ecdit.data.prepare.settings import Settings
from parallel.philox import key_of

JPEG_QUALITY = 95
ORIENTATION = 0x0112  # EXIF's tag
TURNED = range(2, 9)  # its values that say something
SCALED = ("PNG", "PPM")  # of which Pillow makes integers of 16 bits, whatever they had
DEEP = re.compile(r"(?<!BGR);(12|16)")  # bits of a channel; BGR;16 are those of all three
UNSIGNED_16 = re.compile(r";16[BLNR]*( |$)")

# Pillow's own limit warns or raises, by size; ours is a setting, looked at before a pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


class Unusable(Exception):
    """A pair that is left out: a reason, always one of the same few, and what in it is wrong."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass
class Crop:
    """pixels (R, R, 3) uint8; file: as a JPEG; changes: what was done to it that its owner may want to know."""

    pixels: np.ndarray
    file: bytes
    changes: list[str]


def crop(picture: bytes | Image.Image | None, key: str, settings: Settings) -> Crop:
    """The largest square in the middle, or at a random place that the key decides, resized (Lanczos).

    A JPEG that has the size already is kept byte for byte. Raises Unusable.
    """
    if picture is None:
        raise Unusable("no picture")
    if picture == b"":
        raise Unusable("empty picture file")
    side = settings.resolution
    try:
        opened = Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture
        _check_size(opened, settings)
        plain = _is_plain_jpeg(opened) and opened.size == (side, side)
        image, changes = upright_rgb(opened, side)
        if plain and not changes:
            return Crop(np.asarray(image), picture, [])
        image = _square(image, key, settings)
    except Unusable:
        raise
    except Exception as error:  # Pillow has no end of errors for broken files
        raise Unusable("broken picture", f"{type(error).__name__}: {error}") from None
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return Crop(np.asarray(image), file.getvalue(), changes)


def _check_size(image: Image.Image, settings: Settings) -> None:
    width, height = image.size
    told = f"{width}x{height}"
    if width * height > settings.max_megapixels * 1e6:
        raise Unusable("too many pixels", f"{told}, over {settings.max_megapixels:g} megapixels")
    if min(width, height) < settings.min_side:
        raise Unusable("too small", f"{told}, under {settings.min_side}")
    if settings.max_aspect is not None and max(width, height) > settings.max_aspect * min(width, height):
        raise Unusable("too long", f"{told}, over {settings.max_aspect:g} to 1")


def _is_plain_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode == "RGB"


def upright_rgb(image: Image.Image, side: int) -> tuple[Image.Image, list[str]]:
    """Any image in 8-bit RGB, upright, and what had to be done to it."""
    changes = []
    if getattr(image, "n_frames", 1) > 1:
        changes.append("animated: first frame taken")
    if image.getexif().get(ORIENTATION) in TURNED:
        changes.append("turned as its EXIF data say")
    if _is_plain_jpeg(image):
        image.draft("RGB", (2 * side, 2 * side))  # decodes at half, a quarter or an eighth where that is enough
    bits = _bits(image)
    if bits > 8:
        changes.append(f"{bits} bits to 8")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        image = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    elif image.mode == "CMYK":
        changes.append("CMYK to RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        changes.append("transparent: put on white")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), changes


def _bits(image: Image.Image) -> int:
    """Of a channel, in the file. Raises Unusable where nothing says which number is white."""
    raw = " ".join(str(_raw_mode(tile)) for tile in getattr(image, "tile", []))
    if image.mode == "F":
        raise Unusable("broken picture", "pixels are floating-point numbers of no known range")
    if image.mode == "I" and image.format not in SCALED and not UNSIGNED_16.search(raw):
        raise Unusable("broken picture", "pixels are integers of no known range, signed or of 32 bits")
    deep = DEEP.search(raw)
    if deep is None:
        return 16 if image.mode.startswith("I") else 8
    return int(deep[1])


def _raw_mode(tile: tuple) -> object:
    """How the file has its pixels, Pillow's name; what follows it there are places and sizes."""
    arguments = tile[3]
    return arguments[0] if isinstance(arguments, tuple) and arguments else arguments


def _square(image: Image.Image, key: str, settings: Settings) -> Image.Image:
    if settings.crop == "centre":
        return centre_square(image, settings.resolution)
    place = np.random.default_rng(key_of(settings.seed, "crop", key)).random(2)
    left, top = np.rint((np.array(image.size) - min(image.size)) * place).astype(int).tolist()
    return _cut(image, left, top, settings.resolution)


def centre_square(image: Image.Image, side: int) -> Image.Image:
    """The largest square in the middle, resized (Lanczos)."""
    short = min(image.size)
    return _cut(image, (image.width - short) // 2, (image.height - short) // 2, side)


def _cut(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    short = min(image.size)
    return image.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + short, top + short))
