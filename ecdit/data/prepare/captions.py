"""A pair's captions as text: byte for byte, or cleaned where that is asked for."""

import html
import unicodedata

from ecdit.data.prepare.picture import Unusable


def texts(captions: list[str | bytes], *, lines: bool, clean: bool) -> list[str]:
    """The captions that say something. lines: each line of one is a caption. Raises Unusable where none is left."""
    found, broken = [], ""
    for caption in captions:
        try:
            text = caption.decode("utf-8") if isinstance(caption, bytes) else caption
            text.encode("utf-8")  # JSON can hold halves of surrogate pairs
        except UnicodeError as error:
            broken = str(error)
            continue
        found += text.splitlines() if lines else [text]
    found = [cleaned(text) for text in found] if clean else found
    found = [text for text in found if text.strip()]
    if not found and broken:
        raise Unusable("caption is not UTF-8", broken)
    if not found:
        raise Unusable("empty caption" if captions else "no caption")
    return found


def cleaned(text: str) -> str:
    """HTML's entities resolved (twice, for many are escaped twice), Unicode composed, white space and controls made
    single blanks."""
    text = unicodedata.normalize("NFC", html.unescape(html.unescape(text)))
    return " ".join("".join(" " if unicodedata.category(c).startswith("C") else c for c in text).split())
