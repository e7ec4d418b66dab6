"""A study's page with what it was made from, small enough for a repository."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

from ecdit.callbacks.metrics import read_metrics
from ecdit.study.claims import Results
from ecdit.study.plan import PLAN, Study
from ecdit.study.read import RunResult

PAGES = ("index.html", "study.json", "loss.png", "loss.svg")
MOST_LINES, DIGITS = 400, 6  # of metrics.jsonl, evenly spaced; of its numbers
OF_A_PICTURE = ("task", "prompt", "seed", "right")
MIB = 2**20


def publish(study: Study, results: Results, out: Path) -> str:
    """Copies the page, and of each run the recipe and, compressed, its metrics, its held-out losses and what was judged
    of its pictures. What to tell the user."""
    out.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        if (study.folder / name).exists():
            shutil.copyfile(study.folder / name, out / name)
    shutil.copyfile(study.source / PLAN, out / PLAN)
    for runs in results.values():
        for run in runs:
            if run.metrics:
                _publish_run(run, out / "runs" / run.run.name)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"{size / MIB:.2f} MiB in {out}"


def _publish_run(run: RunResult, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.place.recipe_file, folder / "recipe.yaml")
    lines = run.metrics[:: -(-len(run.metrics) // MOST_LINES)]
    _write(folder / "metrics.jsonl.gz", lines if lines[-1] is run.metrics[-1] else [*lines, run.metrics[-1]])
    if run.place.held_out_file.exists():
        _write(folder / "held-out.jsonl.gz", read_metrics(run.place.held_out_file))
    if run.judged:
        _write(folder / "shapes.jsonl.gz", [{k: line[k] for k in OF_A_PICTURE} for line in read_metrics(run.trace)])


def _write(file: Path, records: list[dict[str, Any]]) -> None:
    """Without a time, so that the same data are the same bytes."""
    text = "".join(json.dumps(_rounded(record)) + "\n" for record in records)
    file.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return {key: _rounded(part) for key, part in value.items()} if isinstance(value, dict) else value
