"""A study's page with what it was made from, small enough for a repository."""

import gzip
import shutil
from pathlib import Path

from ecdit.study.claims import Results
from ecdit.study.plan import PLAN, Study
from ecdit.study.read import RunResult

PAGES = ("index.html", "study.json", "loss.png", "loss.svg")
MIB = 2**20


def publish(study: Study, results: Results, out: Path) -> str:
    """Copies the page, and of each run the recipe, metrics.jsonl, held-out.jsonl and what was judged of its pictures,
    compressed. What to tell the user."""
    out.mkdir(parents=True, exist_ok=True)
    for name in PAGES:
        if (study.folder / name).exists():
            shutil.copyfile(study.folder / name, out / name)
    shutil.copyfile(study.source / PLAN, out / PLAN)
    for runs in results.values():
        for run in runs:
            if run.metrics:
                _publish_run(run, out / "runs")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return f"{size / MIB:.2f} MiB in {out}"


def _publish_run(run: RunResult, out: Path) -> None:
    folder = out / run.run.name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run.place.recipe_file, folder / "recipe.yaml")
    for file in (run.place.metrics_file, run.place.held_out_file, run.trace):
        if file.exists():
            # without a time, so that the same data are the same bytes
            (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), 9, mtime=0))
