"""What every suite of `ecdit evaluate` is: pictures that it asks for, and a judgement of them."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ecdit.errors import UserError
from ecdit.prompts import Request


@dataclass(frozen=True)
class Options:
    """What the command line says; a suite reads those that concern it. n: None: the suite's own number of pictures."""

    folder: Path  # of what suites write besides scores
    n: int | None = None
    seed: int = 0
    prompts: Path | None = None
    reference: Path | None = None
    inception: Path | None = None
    clip: str | None = None
    metadata: Path | None = None
    geneval: Path | None = None
    geneval_python: str | None = None
    detector: Path | None = None
    questions: Path | None = None
    vqa: str | None = None
    vqa_model: str | None = None
    parti: Path | None = None


@dataclass(frozen=True)
class Row:
    """A line of a suite's table. key: of the paper's figure for it, where there may be one."""

    name: str
    value: str
    pictures: str = ""
    key: str = ""


@dataclass
class Judgement:
    """scores: what becomes JSON. details: for each picture, in the order of the requests, what is known of it."""

    scores: dict[str, Any]
    details: list[dict[str, Any]]


class Suite(Protocol):
    """Made by all ranks from `(Options, Recipe)`, which raises UserError for input that is missing or wrong."""

    def requests(self) -> list[Request]:
        """The pictures to draw, no two alike."""

    def load(self) -> None:
        """On the first rank, before anything is drawn: what needs weights. Raises UserError where they are no good."""

    def judge(self, pictures: list[Path]) -> Judgement:
        """On the first rank, when all are drawn; a path for each request."""

    @staticmethod
    def rows(scores: dict[str, Any]) -> list[Row]:
        """For the table."""


def device() -> torch.device:
    """Where a judge computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def needed(suite: str, option: str, value: Any, meaning: str) -> Any:
    """The option's value. Raises UserError where it was not given."""
    if value is None:
        raise UserError(f"--suite {suite}: needs {option}: {meaning}")
    return value


def existing(option: str, path: Path, *, folder: bool = False) -> Path:
    """The path. Raises UserError where there is nothing of that kind."""
    if not (path.is_dir() if folder else path.is_file()):
        raise UserError(f"{option}: {path}: no such {'folder' if folder else 'file'}")
    return path


def whole(option: str, name: str, loaded: tuple[nn.Module, dict[str, Any]]) -> nn.Module:
    """The model that `from_pretrained(..., output_loading_info=True)` gave. Raises UserError where some of its weights
    are missing: transformers would make them up."""
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        lost = f"{missing[0]} and {len(missing) - 1} more"
        raise UserError(f"{option}: {name!r} lacks weights: {lost}; valid: weights of a {type(model).__name__}")
    return model.eval()


def packages(suite: str, *names: str) -> None:
    """Raises UserError where a package of the extra `eval` is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--suite {suite}: needs the package {name}; install the extra `ecdit[eval]`")
