"""GenEval (Ghosh et al. 2023): pictures in the folders that its repository's scorer reads, and what it says of them.

IMAGES/00000/metadata.jsonl is line 0 of the repository's prompts/evaluation_metadata.jsonl, IMAGES/00000/samples/ has
0000.png and on. The scorer needs a GPU, mmdetection 2 and a Mask2Former, in an environment of its own. Its scripts are
run from their own folder: the one that prints the table looks for a list of names where it is started.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ecdit.errors import UserError
from ecdit.evaluate.suite import Judgement, Options, Row, existing, needed
from ecdit.prompts import Request, repeat
from ecdit.recipe import Recipe

METADATA = "prompts/evaluation_metadata.jsonl"
JUDGE, SUMMARY = "evaluation/evaluate_images.py", "evaluation/summary_scores.py"
DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth"  # as its download_models.sh names it
TASK = re.compile(r"^(\w+)\s*= ([\d.]+)% \((\d+) / (\d+)\)$", re.MULTILINE)  # "counting   = 40.00% (128 / 320)"
OVERALL = re.compile(r"^Overall score.*: ([\d.]+)$", re.MULTILINE)


def read_metadata(file: Path) -> list[dict[str, Any]]:
    """A line of the file for each prompt. Raises UserError where one is not GenEval's."""
    lines = []
    try:
        text = existing("--metadata", file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--metadata: {file}: is no UTF-8 text; valid: GenEval's {METADATA}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            values = json.loads(line)
            valid = {"tag", "include", "prompt"} <= values.keys() and isinstance(values["prompt"], str)
        except (ValueError, AttributeError):
            valid = False
        if not valid:
            raise UserError(f"--metadata: {file}, line {number}: valid: an object with tag, include and prompt, a text")
        lines.append(values)
    if not lines:
        raise UserError(f"--metadata: {file}: is empty; valid: GenEval's {METADATA}")
    return lines


class GenEvalSuite:
    """See `ecdit.evaluate.suite.Suite`. `n`: pictures a prompt, 4 if not given, as GenEval has it."""

    def __init__(self, options: Options, recipe: Recipe):
        self._repository, self._detector = options.geneval, options.detector
        file = options.metadata
        if self._repository is not None:
            for script in (JUDGE, SUMMARY):
                existing("--geneval", self._repository / script)
            folder = needed("geneval", "--detector", self._detector, "the Mask2Former's folder")
            existing("--detector", folder / DETECTOR)
            file = file or self._repository / METADATA
        elif self._detector is not None:
            raise UserError("--detector: is for GenEval's scorer: needs --geneval, the folder of its repository")
        meaning = f"GenEval's {METADATA}; or --geneval, the folder of its repository"
        self._metadata = read_metadata(needed("geneval", "--metadata", file, meaning))
        self._python = options.geneval_python or sys.executable
        self._n, self._seed, self._folder = options.n or 4, options.seed, options.folder / "geneval"

    def requests(self) -> list[Request]:
        """`n` pictures a prompt."""
        return repeat([line["prompt"] for line in self._metadata], self._n, self._seed)

    def load(self) -> None:
        """The detector is loaded by GenEval's own script; here it shows that it finds the packages and the GPU that it
        needs."""
        if self._repository is not None:
            self._run(JUDGE, "--help")

    def judge(self, pictures: list[Path]) -> Judgement:
        """Lays the pictures out, and where the repository is given runs its scripts and reads their table."""
        images = self._lay_out(pictures)
        found: dict[str, Any] = {"suite": "geneval", "images": str(images), "pictures": len(pictures)}
        details = [{"tag": line["tag"]} for line in self._metadata for _ in range(self._n)]
        if self._repository is not None:
            results = (self._folder / "results.jsonl").resolve()
            self._run(JUDGE, images.resolve(), "--outfile", results, "--model-path", self._detector.resolve())
            found |= read_summary(self._run(SUMMARY, results))
            _add_verdicts(details, results, self._n)
        return Judgement(found, details)

    def _lay_out(self, pictures: list[Path]) -> Path:
        images = self._folder / "images"
        shutil.rmtree(self._folder, ignore_errors=True)
        for number, line in enumerate(self._metadata):
            samples = images / f"{number:05}" / "samples"
            samples.mkdir(parents=True)
            (samples.parent / "metadata.jsonl").write_text(json.dumps(line), encoding="utf-8")
            for i in range(self._n):
                shutil.copyfile(pictures[number * self._n + i], samples / f"{i:04}.png")
        return images

    def _run(self, script: str, *arguments: object) -> str:
        file = (self._repository / script).resolve()
        # a path from here would be another one from there; a link of a virtual environment must not be followed
        python = os.path.abspath(self._python) if os.sep in self._python else self._python
        command = [python, str(file), *map(str, arguments)]
        try:
            done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=True)
        except OSError as error:
            raise UserError(f"--geneval-python: {self._python}: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            last = "; ".join(error.stderr.strip().splitlines()[-2:])
            raise UserError(
                f"--geneval: {script} fails under {self._python}: {last}; valid: GenEval's own environment, given as "
                "--geneval-python"
            ) from None
        return done.stdout

    @staticmethod
    def rows(scores: dict[str, Any]) -> list[Row]:
        """A task a row and their mean; without the repository, where the pictures are."""
        if "overall" not in scores:
            return [Row("pictures for GenEval's scorer", scores["images"], str(scores["pictures"]))]
        rows = [Row(name, f"{one['score']:.2%}", str(one["pictures"]), name) for name, one in scores["tasks"].items()]
        return [*rows, Row("overall", f"{scores['overall']:.2%}", str(scores["pictures"]), "overall")]


def read_summary(text: str) -> dict[str, Any]:
    """What summary_scores.py prints, as numbers. Raises UserError where it prints something else."""
    overall = OVERALL.search(text)
    tasks = {
        tag: {"score": int(right) / int(pictures), "pictures": int(pictures)}
        for tag, _, right, pictures in TASK.findall(text)
    }
    if overall is None or not tasks:
        raise UserError(f"--geneval: {SUMMARY} prints no table that is known: {text[:200]!r}")
    return {"overall": float(overall[1]), "tasks": tasks}


def _add_verdicts(details: list[dict[str, Any]], results: Path, n: int) -> None:
    for line in results.read_text(encoding="utf-8").splitlines():
        verdict = json.loads(line)
        picture = Path(verdict["filename"])
        place = int(picture.parts[-3]) * n + int(picture.stem)
        details[place] |= {"right": verdict["correct"], "reason": verdict["reason"]}
