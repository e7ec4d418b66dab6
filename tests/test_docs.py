"""The documentation is true: its commands run, its table of keys is the schema's, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from benchmarks import BENCHMARKS
from ecdit.recipe import Recipe
from tests.photographs import make_tar

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
KEYS = ROOT / "docs/recipes.md"
QUICK = {  # the quickstart's recipe as the commands meet it here: same keys, little work
    "model": {"layers": 2, "width": 32, "text_width": 16},
    "train": {"steps": 6},
    "checkpoint": {"every": 3},
    "sample": {"steps": 2},
}


def blocks(language):
    for page in PAGES:
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield page.name, block


def commands():
    """Every line of every shell block, and every inline `ecdit ...` that names all its arguments."""
    for _, block in blocks("sh"):
        yield from block.splitlines()
    yield from re.findall(r"`(ecdit prepare [^`]*photographs)`", (ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like a clone, whose quickstart is small."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "recipes").mkdir()
    QUICK["extends"] = str(ROOT / "recipes/quickstart.yaml")
    (folder / "recipes/quickstart.yaml").write_text(yaml.safe_dump(QUICK))
    make_tar(folder / "photographs.tar")
    return folder


def run(arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(map(str, arguments))}\n{done.stderr}"
    return done


def test_every_command_runs(place):
    """In the order of the pages. make's targets are run by the gate; the benchmark's figures by `pytest -m slow`."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for line in commands():
        program, *arguments = shlex.split(line)
        seen += 1
        if program == "make":
            assert arguments[0] in targets
        elif program == "torchrun":
            run([sys.executable, "-m", "torch.distributed.run", *arguments], place)
        elif arguments[0] == "bench":
            assert arguments[1] in BENCHMARKS
        else:
            assert program == "ecdit", line
            run([sys.executable, "-m", "ecdit.cli", *arguments], place)
    assert seen > 8
    for _, block in blocks("python"):
        run([sys.executable, "-c", block], place)
    assert (place / "runs/quickstart/heatmap.png").exists()


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def described(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield f"| **`{prefix}{name}`** | | {field.description} |"
            yield from described(kind, f"{prefix}{name}.")
            continue
        default = "(must be given)" if field.default is PydanticUndefined else f"`{field.default}`"
        yield f"| `{prefix}{name}` | {default} | {field.description} |"


def test_the_table_of_keys_is_the_schemas(request):
    """`pytest --update-golden` writes it anew."""
    head, table = KEYS.read_text().split("## Every key\n\n")
    expected = "\n".join(["| key | default | meaning |", "|---|---|---|", *described(Recipe)]) + "\n"
    if request.config.getoption("--update-golden"):
        KEYS.write_text(f"{head}## Every key\n\n{expected}")
        table = expected
    assert table == expected
