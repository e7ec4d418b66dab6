"""Davidsonian Scene Graph (Cho et al. 2024): questions about what a prompt states, some of which rest on others.

The questions are those of the authors' repository, dsg-1k-anns.csv: a row a question, with the prompt (`text`), the
question's number among its prompt's (`proposition_id`), the numbers that it rests on (`dependency`, "1,4"; 0: none).
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit.errors import UserError
from ecdit.evaluate.suite import Judgement, Options, Row, existing, needed
from ecdit.evaluate.vqa import open_vqa, says_yes
from ecdit.pictures import digest
from ecdit.prompts import Request, repeat
from ecdit.recipe import Recipe

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "category_broad", "question_natural_language")
ASKED_BETWEEN_NOTES = 64  # questions after which answers are written down
CATEGORIES = {  # of the prompts, by what their item_id has in it; the authors' names
    "tifa": "tifa",
    "stanford": "paragraph",
    "localized": "paragraph",
    "countbench": "count",
    "vrd": "relation",
    "diffusion": "real_user",
    "midjourney": "real_user",
    "posescript": "pose",
    "whoops": "defying",
    "drawtext": "text",
}


@dataclass(frozen=True)
class Question:
    """number: among those of its prompt; parents: the numbers that it rests on; None: the file has no numbers."""

    number: int
    parents: tuple[int, ...] | None
    category: str
    text: str


@dataclass
class Item:
    """A prompt with its questions."""

    name: str
    prompt: str
    questions: list[Question]

    @property
    def category(self) -> str:
        """Where the prompt is from; its own name's beginning where it is not one of DSG-1k's."""
        return next((c for part, c in CATEGORIES.items() if part in self.name), self.name.rsplit("_", 1)[0])


def read_questions(file: Path) -> list[Item]:
    """The prompts in the file's order. Raises UserError for a file without the columns, or a row that is wrong."""
    with existing("--questions", file).open(encoding="utf-8-sig", newline="") as lines:
        try:
            reader = csv.DictReader(lines)
            rows, columns = list(reader), reader.fieldnames or []
        except (UnicodeDecodeError, csv.Error):
            rows, columns = [], []
    if not rows or not set(COLUMNS) <= set(columns):
        raise UserError(f"--questions: {file}: valid: a csv file as dsg-1k-anns.csv, with columns {', '.join(COLUMNS)}")
    items: dict[str, Item] = {}
    for line, row in enumerate(rows, start=2):
        item = items.setdefault(row["item_id"], Item(row["item_id"], row["text"], []))
        item.questions.append(_question(row, f"--questions: {file}, row {line}"))
    return list(items.values())


def _question(row: dict[str, str], place: str) -> Question:
    try:
        number = int(row["proposition_id"])
    except (ValueError, TypeError):
        raise UserError(f"{place}: proposition_id: {row['proposition_id']!r}; valid: a whole number") from None
    return Question(number, _parents(row["dependency"]), row["category_broad"], row["question_natural_language"])


def _parents(text: str) -> tuple[int, ...] | None:
    try:
        return tuple(sorted({int(part) for part in text.split(",")} - {0}))
    except (ValueError, AttributeError):
        return None


def score_item(questions: list[Question], yes: dict[int, bool]) -> dict[int, bool]:
    """Which questions count as right, as the authors count: those answered yes whose parents all are answered yes too
    (a parent's own parents do not matter). Where a dependency of the prompt is no number, as "5, right" in some rows of
    theirs, none of its questions rests on another; a parent that is not in the file is left out."""
    if any(q.parents is None for q in questions):
        return dict(yes)
    return {q.number: yes[q.number] and all(yes.get(parent, True) for parent in q.parents) for q in questions}


class DsgSuite:
    """See `ecdit.evaluate.suite.Suite`. `n`: pictures a prompt, one if not given."""

    def __init__(self, options: Options, recipe: Recipe):
        self._items = read_questions(needed("dsg", "--questions", options.questions, "a file such as dsg-1k-anns.csv"))
        meaning = "an OpenAI-compatible server's address, or a VQA model's local folder or hub name"
        self._vqa_name = needed("dsg", "--vqa", options.vqa, meaning)
        self._vqa_model = options.vqa_model
        self._n, self._seed, self._notes = options.n or 1, options.seed, options.folder / "dsg-answers.jsonl"

    def requests(self) -> list[Request]:
        """`n` pictures a prompt."""
        return repeat([item.prompt for item in self._items], self._n, self._seed)

    def load(self) -> None:
        """Who answers."""
        self._vqa = open_vqa(self._vqa_name, self._vqa_model)

    def judge(self, pictures: list[Path]) -> Judgement:
        """Mean over pictures of the share of right questions; that by category of the prompts, and the share of right
        questions by category of these."""
        shown = [item for item in self._items for _ in range(self._n)]
        pairs = [(path, q.text) for path, item in zip(pictures, shown, strict=True) for q in item.questions]
        answers = iter(self._answers(pairs))
        details, prompts, questions = [], {}, {}
        for item in shown:
            given = {q.number: next(answers) for q in item.questions}
            right = score_item(item.questions, {number: says_yes(answer) for number, answer in given.items()})
            share = sum(right.values()) / len(right)
            details.append({"item_id": item.name, "category": item.category, "dsg": share, "answers": given})
            prompts.setdefault(item.category, []).append(share)
            for q in item.questions:
                questions.setdefault(q.category, []).append(right[q.number])
        summary = {
            "suite": "dsg",
            "overall": _mean([detail["dsg"] for detail in details]),
            "pictures": len(details),
            "categories": {name: {"dsg": _mean(values), "pictures": len(values)} for name, values in prompts.items()},
            "questions": {name: {"right": _mean(values), "asked": len(values)} for name, values in questions.items()},
            "vqa": self._vqa.name,
        }
        return Judgement(summary, details)

    def _answers(self, pairs: list[tuple[Path, str]]) -> list[str]:
        """Asks what has not been asked of the same picture before; every answer is noted as it comes."""
        digests = {path: digest(path) for path in dict.fromkeys(p for p, _ in pairs)}
        keys = [(self._vqa.name, digests[path], question) for path, question in pairs]
        known = _read_notes(self._notes)
        new = [i for i, key in enumerate(keys) if key not in known]
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        with self._notes.open("a", encoding="utf-8") as notes:
            for first in range(0, len(new), ASKED_BETWEEN_NOTES):
                part = new[first : first + ASKED_BETWEEN_NOTES]
                for i, answer in zip(part, self._vqa.ask([pairs[i] for i in part]), strict=True):
                    known[keys[i]] = answer
                    notes.write(json.dumps([*keys[i], answer]) + "\n")
                notes.flush()
        return [known[key] for key in keys]

    @staticmethod
    def rows(scores: dict[str, Any]) -> list[Row]:
        """Prompts by category, questions by category, and all."""
        rows = [Row(name, f"{one['dsg']:.1%}", str(one["pictures"])) for name, one in scores["categories"].items()]
        for name, one in scores["questions"].items():
            rows.append(Row(f"questions: {name}", f"{one['right']:.1%}", f"{one['asked']} asked"))
        return [*rows, Row("overall", f"{scores['overall']:.1%}", str(scores["pictures"]), "overall")]


def _read_notes(file: Path) -> dict[tuple[str, str, str], str]:
    """(model, picture's digest, question) -> answer. A line that a killed run left half-written is left out."""
    known = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            model, picture, question, answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, str):
            known[model, picture, question] = answer
    return known


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
