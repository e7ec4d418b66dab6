"""Finds the shapes and digits in pictures like those of the embedded data set, with nothing learned.

The frame of a picture, one pixel wide, shows background alone: an affine function of the place, fitted there, tells
it everywhere. What differs is grouped into connected pieces; a piece's colour is the nearest of the palette at its
strongest pixels, and its kind the template that its coverage resembles most.

Shapes: `N` pictures, `M` pieces in all of them, `W` pixels of a window's side.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ecdit.data.shapes_draw import COLORS, SHAPES, SIDE, SIZES, coverage, digit_coverage

DIFFERENT = 45.0  # distance in RGB from the background that makes a pixel part of something
LEAST_PIXELS = 8  # of a piece; less is noise
LEAST_LIKENESS = 0.70  # cosine of a piece and its template, under which it is no shape that is known
W = 17
_SHIFTS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]


@dataclass(frozen=True)
class Found:
    """One piece. kind: a shape's name, a digit, or 'unknown'; x and y: its centre; pixels: its area."""

    kind: str
    size: str
    color: str
    x: float
    y: float
    pixels: int


def detect(images: np.ndarray) -> list[list[Found]]:
    """What is in each picture, the largest piece first. images (N, 32, 32, 3) uint8."""
    pictures = images.astype(np.float32)
    contrast = pictures - _background(pictures)
    different = np.linalg.norm(contrast, axis=-1) > DIFFERENT
    found: list[list[Found]] = [[] for _ in images]
    pieces = _pieces(_labels(different))
    if not pieces:
        return found
    windows = np.stack([_window(contrast[n], mask) for n, mask in pieces])
    kinds = _resemble(windows)
    for (n, mask), (kind, size) in zip(pieces, kinds, strict=True):
        color = _color(pictures[n], contrast[n], mask)
        rows, columns = np.nonzero(mask)
        centre = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
        found[n].append(Found(kind, size, color, *map(float, centre), int(mask.sum())))
    return [sorted(things, key=lambda thing: -thing.pixels) for things in found]


def _background(pictures: np.ndarray) -> np.ndarray:
    """The affine function of the place that fits each picture's frame, everywhere. (N, 32, 32, 3)."""
    y, x = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
    places = np.stack([np.ones_like(x), x, y], axis=-1).astype(np.float32)  # (32, 32, 3)
    frame = np.zeros((SIDE, SIDE), bool)
    frame[[0, -1], :] = frame[:, [0, -1]] = True
    solve = np.linalg.pinv(places[frame])  # (3, F)
    coefficients = np.einsum("kf,nfc->nkc", solve, pictures[:, frame])
    return np.einsum("yxk,nkc->nyxc", places, coefficients)


def _labels(mask: np.ndarray) -> np.ndarray:
    """Numbers of the connected pieces (8 neighbours) of each picture, 0 where there is none. (N, 32, 32)."""
    labels = np.where(mask, np.arange(1, SIDE * SIDE + 1).reshape(SIDE, SIDE), 0)
    while True:
        padded = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        spread = labels
        for dy in range(3):
            for dx in range(3):
                spread = np.maximum(spread, padded[:, dy : dy + SIDE, dx : dx + SIDE])
        spread = np.where(mask, spread, 0)
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _pieces(labels: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(picture, mask (32, 32)) of each piece that is large enough."""
    pieces = []
    for n, picture in enumerate(labels):
        numbers, counts = np.unique(picture, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number and count >= LEAST_PIXELS:
                pieces.append((n, picture == number))
    return pieces


def _window(contrast: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """How much of each pixel a piece covers, around the middle of its bounding box. (W, W)."""
    strength = np.linalg.norm(contrast, axis=-1)
    core = contrast[mask & (strength >= np.quantile(strength[mask], 0.6))].mean(0)  # its colour less background
    covered = np.clip(contrast @ core / (core @ core), 0, 1) * _grown(mask)
    rows, columns = np.nonzero(mask)
    middle_y, middle_x = (rows.min() + rows.max() + 1) // 2, (columns.min() + columns.max() + 1) // 2
    padded = np.pad(covered, W // 2)
    return padded[middle_y : middle_y + W, middle_x : middle_x + W]


def _grown(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return np.any([padded[dy : dy + SIDE, dx : dx + SIDE] for dy in range(3) for dx in range(3)], axis=0)


@cache
def _templates() -> tuple[list[tuple[str, str]], np.ndarray]:
    """(kind, size) of each template in each shift, and the templates, of norm 1, (K, W * W)."""
    drawn = {(shape, size): coverage(shape, size) for shape in SHAPES for size in SIZES}
    drawn |= {(digit, "small"): digit_coverage(digit) for digit in "0123456789"}
    names, rows = [], []
    for name, covered in drawn.items():
        for dy, dx in _SHIFTS:
            window = np.zeros((W, W))
            top, left = (W - covered.shape[0] + 1) // 2 + dy, (W - covered.shape[1] + 1) // 2 + dx
            window[top : top + covered.shape[0], left : left + covered.shape[1]] = covered
            names.append(name)
            rows.append(window.ravel() / np.linalg.norm(window))
    return names, np.stack(rows)


def _resemble(windows: np.ndarray) -> list[tuple[str, str]]:
    """(kind, size) of the most similar template of each window (M, W, W)."""
    names, templates = _templates()
    flat = windows.reshape(len(windows), -1)
    likeness = flat @ templates.T / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    best = likeness.argmax(1)
    sure = likeness[np.arange(len(flat)), best] >= LEAST_LIKENESS
    return [names[k] if known else ("unknown", "unknown") for k, known in zip(best, sure, strict=True)]


def _color(picture: np.ndarray, contrast: np.ndarray, mask: np.ndarray) -> str:
    """The palette's colour nearest to the mean of the piece's strongest half."""
    strength = np.linalg.norm(contrast, axis=-1)
    core = mask & (strength >= np.quantile(strength[mask], 0.5))
    names, palette = list(COLORS), np.array(list(COLORS.values()), np.float32)
    return names[int(np.linalg.norm(palette - picture[core].mean(0), axis=1).argmin())]
