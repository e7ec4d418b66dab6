"""How the embedded data set is drawn: its shapes, digits, colours and backgrounds, in plain numpy.

Everything is drawn from coverages of whole-pixel centres, so that an object looks the same wherever it stands, on any
platform. Images are (32, 32, 3) uint8, coverages (side, side) in [0, 1].
"""

from functools import cache

import numpy as np

SIDE = 32
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 4, "large": 6}  # half the width in pixels
DIGIT_SCALE = 2  # pixels for each dot of a digit
COLORS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 225),
    "purple": (130, 40, 170),
    "pink": (255, 130, 190),
    "brown": (130, 75, 30),
    "black": (15, 15, 15),
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
}
BACKGROUNDS = (
    (238, 224, 190),
    (165, 205, 232),
    (185, 228, 190),
    (70, 92, 112),
    (28, 30, 66),
    (206, 188, 228),
    (92, 100, 58),
    (205, 160, 140),
)
CONTRAST = 90.0  # least distance in RGB between an object and the background anywhere
_GLYPHS = {
    "0": "111 101 101 101 111",
    "1": "010 110 010 010 111",
    "2": "111 001 111 100 111",
    "3": "111 001 111 001 111",
    "4": "101 101 111 001 001",
    "5": "111 100 111 001 111",
    "6": "111 100 111 101 111",
    "7": "111 001 010 010 010",
    "8": "111 101 111 101 111",
    "9": "111 101 111 001 111",
}
_SUPER = 8  # samples of a pixel's side


@cache
def coverage(shape: str, size: str) -> np.ndarray:
    """Share of each pixel that a shape covers, (2 h + 1, 2 h + 1) around its centre, h half its width."""
    half = SIZES[size]
    side = 2 * half + 1
    at = ((np.arange(side * _SUPER) + 0.5) / _SUPER - side / 2) / (half + 0.4)
    y, x = np.meshgrid(at, at, indexing="ij")
    return _inside(shape, x, y).reshape(side, _SUPER, side, _SUPER).mean((1, 3))


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are in a shape of half width 1 around the origin; y points down."""
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9
    if shape == "triangle":
        return (y <= 0.9) & (2 * abs(x) <= y + 1)
    if shape == "cross":
        return np.minimum(abs(x), abs(y)) <= 0.28
    if shape == "ring":
        return (radius <= 1) & (radius >= 0.55)
    # a star of five points: its edge runs straight from an outer to an inner corner
    sector = np.mod(np.arctan2(x, -y), 2 * np.pi / 5)
    sector = np.minimum(sector, 2 * np.pi / 5 - sector)
    corner = 0.45 * np.exp(1j * np.pi / 5)  # the inner corner; the outer one is at 1
    point = radius * np.exp(1j * sector)
    return ((point - 1) * np.conj(corner - 1)).imag >= 0


@cache
def digit_coverage(digit: str) -> np.ndarray:
    """A digit of 3x5 dots, (10, 6)."""
    dots = np.array([[int(dot) for dot in row] for row in _GLYPHS[digit].split()], float)
    return np.kron(dots, np.ones((DIGIT_SCALE, DIGIT_SCALE)))


def background(rng: np.random.Generator, colors: list[str]) -> np.ndarray:
    """A plain colour or a gradient between two, (32, 32, 3) in floats, away from all the objects' colours."""
    objects = np.array([COLORS[color] for color in colors], float)
    share = np.linspace(0, 1, SIDE)
    while True:
        first, last = (np.array(BACKGROUNDS[i], float) for i in rng.integers(len(BACKGROUNDS), size=2))
        plain, direction = rng.random() < 0.5, rng.integers(4)
        if plain:
            last = first
        ramp = first + share[:, None] * (last - first)  # (32, 3)
        if np.linalg.norm(ramp[:, None] - objects, axis=-1).min() >= CONTRAST:
            break
    ramp = ramp[::-1] if direction % 2 else ramp
    return np.broadcast_to(ramp[:, None] if direction < 2 else ramp[None], (SIDE, SIDE, 3)).copy()


def paint(canvas: np.ndarray, covered: np.ndarray, color: str, top: int, left: int) -> None:
    """Lays a colour over the canvas where it is covered."""
    rows, columns = covered.shape
    part = canvas[top : top + rows, left : left + columns]
    part += covered[..., None] * (np.array(COLORS[color], float) - part)
