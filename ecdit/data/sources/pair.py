"""What all sources have in common: pairs as they are found, and the parts that hold them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Columns:
    """Names of the fields that hold the picture and the caption or captions, where a source has names for them.

    lines: each line of a .txt file is a caption of its own.
    """

    image: str = "image"
    caption: str = "caption"
    lines: bool = False


@dataclass
class Pair:
    """A picture and its captions as the source has them: files in bytes, nothing checked.

    picture: None where the source lacks it; an Image where the source keeps it decoded.
    """

    key: str
    picture: bytes | Image.Image | None
    captions: list[str | bytes]


@dataclass
class Fault:
    """Something in the source that is no pair: the rest of a file that is cut off, a file that lacks a column."""

    key: str
    reason: str
    detail: str


class Part(Protocol):
    """Some pairs that are read one after the other. It can be sent to another process.

    name: of the file and the place in it. size: pairs, or bytes where those are not known. counted: which of the two.
    """

    name: str
    size: int
    counted: bool

    def pairs(self) -> Iterator[Pair | Fault]:
        """The pairs in order. It raises nothing for what is wrong in the source."""


def listed(value: object) -> list[str | bytes]:
    """A caption field as a list: it may hold one, several, or none."""
    several = list(value) if isinstance(value, list | tuple) else [value]
    return [caption for caption in several if isinstance(caption, str | bytes)]
