"""Files of prompts: plain text, one prompt a line, or JSON lines with a prompt and, where wanted, its seed."""

import json
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from ecdit.errors import UserError

MOST = 2**63  # seeds are counters of 64 bits, signed


@dataclass(frozen=True)
class Request:
    """A picture that is asked for: with a checkpoint and the settings, all that it depends on. Raises UserError for a
    seed that is none, and a prompt that no file can hold."""

    prompt: str
    seed: int

    def __post_init__(self):
        check_seed(self.seed)
        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt: {self.prompt[:80]!a} is no UTF-8 text") from None


def check_seed(seed: int) -> None:
    """Raises UserError where it is none."""
    if not isinstance(seed, Integral) or not 0 <= seed < MOST:
        raise UserError(
            f"seed: {seed!r} is no seed; valid: from 0 to {MOST - 1}, the last of several pictures included"
        )


def read_prompts(file: Path, n: int, seed: int) -> list[Request]:
    """`n` pictures of each prompt of a file, prompt by prompt, with seeds s, s + 1, ...; s is `seed` unless the
    prompt's line has its own. Raises UserError as `read_lines` does."""
    lines = read_lines(file)
    return [Request(prompt, (seed if own is None else own) + i) for prompt, own in lines for i in range(n)]


def read_lines(file: Path) -> list[tuple[str, int | None]]:
    """Each prompt and its own seed, None where it has none. Lines of a `.jsonl` file are objects; keys besides `prompt`
    and `seed` are left alone.

    Raises UserError for a file that cannot be read, has no prompt, or has a line that is none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # editors of Windows begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            f"{file}: cannot read this prompts file: {reason}; valid: one prompt a line, or .jsonl with prompt and seed"
        ) from None
    parse = _object if file.suffix.lower() == ".jsonl" else lambda _, line: (line.strip(), None)
    pairs = [parse(f"{file}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not pairs:
        raise UserError(f"{file}: has no prompt; valid: one prompt a line, or .jsonl with prompt and seed")
    return pairs


def repeat(prompts: list[str], n: int, seed: int) -> list[Request]:
    """`n` pictures of each prompt, no two of them with the same seed: those of a benchmark shall differ in their noise
    too. Another `seed` gives seeds that none of these has."""
    first = seed * len(prompts) * n
    return [Request(prompt, first + n * row + i) for row, prompt in enumerate(prompts) for i in range(n)]


def _object(place: str, line: str) -> tuple[str, int | None]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{place}: {line[:80]!r} is no prompt; valid: {{"prompt": "a red circle", "seed": 0}}')
    seed = values.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < MOST):
        raise UserError(f"{place}: seed: {seed!r} is no seed; valid: a whole number from 0 to {MOST - 1}")
    return values["prompt"], seed
