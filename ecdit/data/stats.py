"""What a data set holds, from samples drawn at random: lengths, sizes, latents' moments, and pairs to look at.

Shapes: `c` latent channels, `h` latents a side.
"""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from ecdit.data.encoded import Encoded, read_encoded
from ecdit.data.shards import ShardFolder

SHOWN, COLUMNS, CELL, LINES = 64, 8, 160, 3


@dataclass
class Stats:
    """captions: characters of each; tokens: of each embedded one; moments: by column, of raw latents' channels (c,)."""

    pairs: int
    bytes: int
    shards: int
    columns: list[str]
    looked_at: int
    captions_a_pair: float
    captions: np.ndarray
    tokens: np.ndarray
    encoded: Encoded
    mean: np.ndarray | None = None
    deviation: np.ndarray | None = None
    whole_deviation: float | None = None
    shown: list[tuple[Image.Image, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {
            "pairs": self.pairs,
            "bytes": self.bytes,
            "shards": self.shards,
            "columns": self.columns,
            "looked_at": self.looked_at,
            "captions_a_pair": self.captions_a_pair,
            "caption_characters": quantiles(self.captions),
            "caption_tokens": quantiles(self.tokens),
        }
        if self.mean is not None:
            stored = self.encoded.pictures
            found["latents"] = {
                "autoencoder": stored.autoencoder if stored else None,
                "mean": self.mean.tolist(),
                "deviation": self.deviation.tolist(),
                "scale": stored.scale if stored else None,
                "shift": stored.shift if stored else None,
                "scale_for_unit_deviation": 1 / self.whole_deviation,
            }
        return found


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Least, median, 95th of a hundred, most."""
    if not len(values):
        return None
    least, median, high, most = np.quantile(values, [0, 0.5, 0.95, 1])
    return {"least": float(least), "median": float(median), "p95": float(high), "most": float(most)}


def look(source: str, sample: int, seed: int) -> Stats:
    """Reads up to `sample` samples. Raises UserError for shards that are missing or damaged."""
    folder = ShardFolder(source)
    folder.check()
    numbers = np.random.default_rng(seed).choice(len(folder), min(sample, len(folder)), replace=False)
    found = Stats(
        len(folder), folder.bytes, len(folder.sizes), folder.columns, len(numbers), 0.0,
        np.empty(0), np.empty(0), read_encoded(source),
    )  # fmt: skip
    lengths, tokens, captions = [], [], 0
    moments = _Moments()
    shown = set(numbers[:SHOWN].tolist())
    for number in np.sort(numbers).tolist():  # shard by shard
        stored = folder.sample(number)
        texts = stored["captions"] if "captions" in stored else [stored["caption"]]
        captions += len(texts)
        lengths += [len(text) for text in texts]
        tokens += stored["text_tokens"].tolist() if "text_tokens" in stored else []
        latent = stored.get("latent_mean", stored.get("latent"))
        if latent is not None:
            moments.add(latent, stored.get("latent_logvar"))
        if number in shown and "image" in stored:
            found.shown.append((_opened(stored["image"]), texts[0]))
    found.captions_a_pair = captions / len(numbers)
    found.captions, found.tokens = np.array(lengths), np.array(tokens)
    if moments.count:
        found.mean, found.deviation, found.whole_deviation = moments.result()
    return found


class _Moments:
    """Mean and deviation of latents' channels; a posterior's variance counts as what its samples would add."""

    def __init__(self):
        self.count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, mean: np.ndarray, logvar: np.ndarray | None) -> None:
        """mean and logvar (c, h, h)."""
        mean = mean.astype(np.float64)
        squares = mean**2 + (0.0 if logvar is None else np.exp(logvar.astype(np.float64)))
        self.count += 1
        self._sum, self._squares = self._sum + mean.mean((1, 2)), self._squares + squares.mean((1, 2))

    def result(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean (c,) and deviation (c,) of the channels, and the deviation of all values around their one mean."""
        mean, squares = self._sum / self.count, self._squares / self.count
        whole = float(np.sqrt(squares.mean() - mean.mean() ** 2))
        return mean, np.sqrt(squares - mean**2), whole


def _opened(picture: bytes | Image.Image) -> Image.Image:
    return (Image.open(io.BytesIO(picture)) if isinstance(picture, bytes) else picture).convert("RGB")


def contact_sheet(pairs: list[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures in rows of COLUMNS, each over the beginning of its caption."""
    font = ImageFont.load_default(11)
    height = CELL + 14 * LINES
    rows = -(-len(pairs) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * CELL, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (picture, caption) in enumerate(pairs):
        left, top = place % COLUMNS * CELL, place // COLUMNS * height
        method = Image.Resampling.LANCZOS if min(picture.size) > CELL else Image.Resampling.NEAREST
        sheet.paste(picture.resize((CELL - 4, CELL - 4), method), (left + 2, top + 2))
        for line, text in enumerate(_lines(caption, draw, font)):
            draw.text((left + 3, top + CELL + 13 * line), text, fill="black", font=font)
    return sheet


def _lines(caption: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> list[str]:
    """The caption's beginning, broken so that lines fit under a picture."""
    lines, line = [], ""
    for word in caption.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font) > CELL - 6:
            lines.append(line)
            line = word
        else:
            line = longer
        if len(lines) == LINES:
            return lines
    return [*lines, line]


def as_table(found: Stats) -> Table:
    """For the terminal."""
    table = Table(show_header=False, title=f"{found.pairs:,} pairs in {found.shards:,} shards")
    told = found.as_dict()
    table.add_row("size", f"{found.bytes / 2**30:.3g} GiB, {found.bytes / found.pairs / 1024:.1f} KiB a pair")
    table.add_row("columns", ", ".join(found.columns))
    table.add_row("looked at", f"{found.looked_at:,} pairs, {found.captions_a_pair:.2f} captions each")
    for name in ("caption_characters", "caption_tokens"):
        if told[name]:
            q = told[name]
            table.add_row(
                name.replace("_", " "),
                f"{q['least']:.0f} to {q['most']:.0f}, median {q['median']:.0f}, 95% up to {q['p95']:.0f}",
            )
    if found.mean is not None:
        latents = told["latents"]
        table.add_row("latents of", str(latents["autoencoder"]))
        table.add_row("raw mean, by channel", ", ".join(f"{v:.3f}" for v in latents["mean"]))
        table.add_row("raw deviation, by channel", ", ".join(f"{v:.3f}" for v in latents["deviation"]))
        table.add_row(
            "scale",
            f"{latents['scale']}; {latents['scale_for_unit_deviation']:.5f} would make the deviation 1",
        )
    return table
