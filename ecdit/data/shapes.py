"""The embedded data set: pictures of coloured shapes with captions whose truth can be checked.

Each sample is a function of (seed, index). Its task is one of GenEval's six (Ghosh et al. 2023), or digits; its
caption states what the picture must show and nothing that it does not.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ecdit.data.shapes_draw import COLORS, SHAPES, SIDE, SIZES, background, coverage, digit_coverage, paint

# Share of each task. A small model learns one object and its colour first, so they come often.
TASKS = {
    "colors": 0.30,
    "single_object": 0.10,
    "two_object": 0.10,
    "color_attr": 0.15,
    "position": 0.15,
    "counting": 0.12,
    "digits": 0.08,
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
NUMBERS = ("zero", "one", "two", "three", "four")
GAP = 2  # least pixels between two objects
_PLAIN = ("{}", "a picture of {}", "there is {}", "an image with {}")
_PLURAL = ("{}", "a picture of {}", "there are {}", "an image with {}")


@dataclass(frozen=True)
class Object:
    """One shape of a scene; x and y are its centre in pixels."""

    shape: str
    color: str
    size: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and what its caption states of it.

    stated: for each object the words that the caption uses (shape, color, size); relation: of the first object to the
    second; digits: the number written, in digits_color.
    """

    task: str
    objects: tuple[Object, ...] = ()
    stated: tuple[dict[str, str], ...] = ()
    relation: str | None = None
    digits: str | None = None
    digits_color: str | None = None


@dataclass(frozen=True)
class Sample:
    """image (32, 32, 3) uint8."""

    image: np.ndarray = field(repr=False)
    caption: str
    scene: Scene


def make(seed: int, index: int) -> Sample:
    """Sample `index` of the data set `seed`: the same on every platform."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))
    task = str(rng.choice(list(TASKS), p=list(TASKS.values())))
    return make_task(task, rng)


def make_task(task: str, rng: np.random.Generator) -> Sample:
    """A sample of one task."""
    if task == "digits":
        return _digits(rng)
    scene = _SCENES[task](rng)
    colors = [thing.color for thing in scene.objects]
    canvas = background(rng, colors)
    for thing in scene.objects:
        half = SIZES[thing.size]
        paint(canvas, coverage(thing.shape, thing.size), thing.color, thing.y - half, thing.x - half)
    return Sample(_to_bytes(canvas), _caption(scene, rng), scene)


# ----------------------------------------------------------------------------------------------------------- scenes


def _single(rng: np.random.Generator, words: tuple[str, ...], task: str) -> Scene:
    size = _pick(rng, SIZES)
    (x, y), *_ = _places(rng, [size])
    thing = Object(_pick(rng, SHAPES), _pick(rng, COLORS), size, x, y)
    if rng.random() < 0.25:
        words = ("size", *words)
    return Scene(task, (thing,), (_words(thing, words),))


def _pair(rng: np.random.Generator, words: tuple[str, ...], task: str, relation: str | None = None) -> Scene:
    shapes = rng.choice(SHAPES, size=2, replace=False)
    colors = rng.choice(list(COLORS), size=2, replace=False)
    sizes = [_pick(rng, SIZES) for _ in range(2)]
    places = _places(rng, sizes, relation)
    things = tuple(
        Object(str(shape), str(color), size, x, y)
        for shape, color, size, (x, y) in zip(shapes, colors, sizes, places, strict=True)
    )
    return Scene(task, things, tuple(_words(thing, words) for thing in things), relation)


def _position(rng: np.random.Generator) -> Scene:
    words = ("color", "shape") if rng.random() < 0.5 else ("shape",)
    return _pair(rng, words, "position", _pick(rng, RELATIONS))


def _counting(rng: np.random.Generator) -> Scene:
    count = int(rng.integers(2, 5))
    shape, color, size = _pick(rng, SHAPES), _pick(rng, COLORS), _pick(rng, SIZES)
    things = tuple(Object(shape, color, size, x, y) for x, y in _places(rng, [size] * count))
    words = ("color", "shape") if rng.random() < 0.7 else ("shape",)
    return Scene("counting", things, tuple(_words(thing, words) for thing in things))


_SCENES = {
    "single_object": lambda rng: _single(rng, ("shape",), "single_object"),
    "colors": lambda rng: _single(rng, ("color", "shape"), "colors"),
    "two_object": lambda rng: _pair(rng, ("shape",), "two_object"),
    "color_attr": lambda rng: _pair(rng, ("color", "shape"), "color_attr"),
    "position": _position,
    "counting": _counting,
}


def _digits(rng: np.random.Generator) -> Sample:
    text, color = str(int(rng.integers(0, 100))), _pick(rng, COLORS)
    canvas = background(rng, [color])
    height, width = digit_coverage("0").shape
    total = len(text) * (width + GAP) - GAP
    top = int(rng.integers(1, SIDE - height))
    left = int(rng.integers(1, SIDE - total))
    for i, digit in enumerate(text):
        paint(canvas, digit_coverage(digit), color, top, left + i * (width + GAP))
    wordings = (f"the number {text} in {color}", f"{_article(color)} {color} {text}", f"{text} written in {color}")
    scene = Scene("digits", digits=text, digits_color=color)
    return Sample(_to_bytes(canvas), _pick(rng, wordings), scene)


def _places(rng: np.random.Generator, sizes: list[str], relation: str | None = None) -> list[tuple[int, int]]:
    """Centres that keep a pixel from the edge and GAP from each other.

    Three and four stand in a quarter of the picture each; two anywhere, drawn anew until they fit. Under a relation
    the first stands clear of the second along it, and less far off across.
    """
    halves = [SIZES[size] for size in sizes]
    if len(sizes) > 2:
        quarters = rng.permutation(4)[: len(sizes)].tolist()
        return [
            (_within(rng, half, q % 2), _within(rng, half, q // 2)) for half, q in zip(halves, quarters, strict=True)
        ]
    while True:
        places = [tuple(int(v) for v in rng.integers(half + 1, SIDE - 1 - half, size=2)) for half in halves]
        if len(places) == 1:
            return places
        apart = max(abs(a - b) for a, b in zip(*places, strict=True))
        if apart > sum(halves) + GAP and (relation is None or _stands(*places, relation, sum(halves))):
            return places


def _within(rng: np.random.Generator, half: int, far: int) -> int:
    """A place in the near or the far half of the picture's side, clear of the other half."""
    first, last = half + 1, SIDE // 2 - half - 2
    return int(rng.integers(first, last + 1)) + far * SIDE // 2


def _stands(first: tuple[int, int], second: tuple[int, int], relation: str, clear: int) -> bool:
    along_x, along_y = RELATIONS[relation]
    dx, dy = first[0] - second[0], first[1] - second[1]
    along, across = (dx * along_x, dy) if along_x else (dy * along_y, dx)
    return along > clear and abs(across) < along


# --------------------------------------------------------------------------------------------------------- captions


def _words(thing: Object, words: tuple[str, ...]) -> dict[str, str]:
    return {word: getattr(thing, word) for word in words}


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    names = [" ".join(stated.values()) for stated in scene.stated]
    if scene.task == "counting":
        return _pick(rng, _PLURAL).format(f"{NUMBERS[len(names)]} {plural(names[0])}")
    named = [f"{_article(name)} {name}" for name in names]
    if scene.relation:
        return _pick(rng, _PLAIN).format(f"{named[0]} {scene.relation} {named[1]}")
    return _pick(rng, _PLAIN).format(" and ".join(named))


def plural(name: str) -> str:
    """'red cross' -> 'red crosses'."""
    return name + ("es" if name.endswith("s") else "s")


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _pick(rng: np.random.Generator, choices) -> str:
    return list(choices)[int(rng.integers(len(choices)))]


def _to_bytes(canvas: np.ndarray) -> np.ndarray:
    return np.round(canvas).astype(np.uint8)


def as_json(scene: Scene) -> dict[str, Any]:
    """The scene in plain values."""
    return {
        "task": scene.task,
        "objects": [vars(thing) for thing in scene.objects],
        "stated": list(scene.stated),
        "relation": scene.relation,
        "digits": scene.digits,
        "digits_color": scene.digits_color,
    }


def stored(seed: int, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Samples as the columns of shards: the picture as a PNG's bytes."""
    found = []
    for number in numbers:
        sample, file = make(seed, number), io.BytesIO()
        Image.fromarray(sample.image).save(file, "PNG")
        known = {"caption": sample.caption, "key": f"shapes-{seed}-{number}", "scene": as_json(sample.scene)}
        found.append({"image": file.getvalue(), **known})
    return found
