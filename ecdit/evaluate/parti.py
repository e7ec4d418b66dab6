"""PartiPrompts (Yu et al. 2022): of a prompt's pictures the one with the best CLIP score, as the paper shows them.

The prompts are Google's PartiPrompts.tsv: Prompt, Category, Challenge, Note, separated by tabs, nothing quoted.
"""

import csv
import shutil
from pathlib import Path
from typing import Any

from ecdit.errors import UserError
from ecdit.evaluate.clip import Clip
from ecdit.evaluate.suite import Judgement, Options, Row, existing, needed, packages
from ecdit.prompts import Request, repeat
from ecdit.recipe import Recipe

COLUMNS = ("Prompt", "Category", "Challenge")


def read_parti(file: Path) -> list[dict[str, str]]:
    """The rows, once each prompt. Raises UserError for another kind of file."""
    with existing("--parti", file).open(encoding="utf-8-sig", newline="") as lines:
        try:
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = {row["Prompt"]: row for row in reader if row.get("Prompt")}
            columns = reader.fieldnames or []
        except (KeyError, UnicodeDecodeError, csv.Error):
            rows, columns = {}, []
    missing = [column for column in COLUMNS if column not in columns]
    if missing or not rows:
        raise UserError(
            f"--parti: {file}: valid: PartiPrompts.tsv, with columns {', '.join(COLUMNS)} and a row a prompt"
        )
    return list(rows.values())


class PartiSuite:
    """See `ecdit.evaluate.suite.Suite`. `n`: pictures a prompt, 4 if not given."""

    def __init__(self, options: Options, recipe: Recipe):
        packages("parti", "transformers")
        self._rows = read_parti(needed("parti", "--parti", options.parti, "PartiPrompts.tsv"))
        self._name = needed("parti", "--clip", options.clip, "the local folder or hub name of the CLIP that chooses")
        self._n, self._seed, self._folder = options.n or 4, options.seed, options.folder / "parti"

    def requests(self) -> list[Request]:
        """`n` pictures a prompt."""
        return repeat([row["Prompt"] for row in self._rows], self._n, self._seed)

    def load(self) -> None:
        """The CLIP."""
        self._clip = Clip(self._name)

    def judge(self, pictures: list[Path]) -> Judgement:
        """Copies the best of each prompt's pictures; the scores of these, by category and by challenge."""
        texts = [row["Prompt"] for row in self._rows for _ in range(self._n)]
        scores = self._clip.scores(pictures, texts).view(len(self._rows), self._n)
        best = scores.argmax(1).tolist()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for number, chosen in enumerate(best):
            shutil.copyfile(pictures[number * self._n + chosen], self._folder / f"{number:04}.png")
        top = scores.amax(1).tolist()
        details = [
            {"category": row["Category"], "clip": scores[i, k].item(), "best": k == best[i]}
            for i, row in enumerate(self._rows)
            for k in range(self._n)
        ]
        summary = {
            "suite": "parti",
            "best_clip_score": sum(top) / len(top),
            "mean_clip_score": scores.mean().item(),
            "of": self._n,
            "prompts": len(top),
            "categories": _means(top, [row["Category"] for row in self._rows]),
            "challenges": _means(top, [row["Challenge"] for row in self._rows]),
            "clip": self._name,
            "folder": str(self._folder),
        }
        return Judgement(summary, details)

    @staticmethod
    def rows(scores: dict[str, Any]) -> list[Row]:
        """The best pictures' scores by category, and over all prompts."""
        rows = [
            Row(name, f"{one['clip_score']:.2f}", str(one["prompts"])) for name, one in scores["categories"].items()
        ]
        rows.append(Row(f"best of {scores['of']}", f"{scores['best_clip_score']:.2f}", str(scores["prompts"])))
        return [*rows, Row(f"mean of {scores['of']}", f"{scores['mean_clip_score']:.2f}", str(scores["prompts"]))]


def _means(values: list[float], names: list[str]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[float]] = {}
    for value, name in zip(values, names, strict=True):
        groups.setdefault(name, []).append(value)
    return {name: {"clip_score": sum(group) / len(group), "prompts": len(group)} for name, group in groups.items()}
