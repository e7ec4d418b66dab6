"""The documentation is true: its commands run, its table of keys is the schema's, its links lead somewhere."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from benchmarks import BENCHMARKS
from ecdit import load_recipe
from ecdit.recipe import Recipe
from tests.command import ecdit
from tests.photographs import make_tar
from tests.ranks import free_port

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
KEYS = ROOT / "docs/recipes.md"
# diffusers imports a torchvision that it finds, also one that was built for another torch
GUARD = "from ecdit.data.torchvision_guard import hide_broken_torchvision; hide_broken_torchvision()"
QUICK = {  # the quickstart's recipe as the commands meet it here: same keys, little work
    "model": {"layers": 2, "width": 32, "text_width": 16},
    "train": {"steps": 6},
    "checkpoint": {"every": 4},
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
    make_study(folder / "recipes/study/cpu")
    make_tar(folder / "photographs.tar")
    return folder


def make_study(folder):
    """A dense and an expert-choice model."""
    folder.mkdir(parents=True)
    source = ROOT / "recipes/study/cpu"
    plan = yaml.safe_load((source / "study.yaml").read_text())
    plan |= {"equal_compute": "dense", "token_choice": "dense", "expert_choice": ["expert_choice_8e"], "pictures": 1}
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    (folder / "base.yaml").write_text(yaml.safe_dump(QUICK | {"extends": str(source / "base.yaml")}))
    for name in ("dense", "expert_choice_8e"):
        shutil.copy(source / f"{name}.yaml", folder)


def run(arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(map(str, arguments))}\n{done.stderr}"


def serve(arguments, folder):
    """Until the page answers; then Ctrl-C, which ends it well."""
    port = free_port()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ecdit.cli", *arguments, "--port", str(port)]
    minding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    options = {"cwd": folder, "env": environment, "stderr": subprocess.PIPE, "text": True, "preexec_fn": minding}
    with subprocess.Popen(command, **options) as server:
        try:
            wait_for_page(server, port)
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0, server.stderr.read()
        finally:
            server.kill()


def wait_for_page(server, port):
    deadline = time.monotonic() + 120
    while True:
        try:
            assert urlopen(f"http://127.0.0.1:{port}", timeout=10).status == 200
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, server.stderr.read()
            time.sleep(0.2)


def test_every_command_runs(place):
    """In the order of the pages. make's targets are run by the gate; `bench moe`'s figures by `pytest -m slow`."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for line in commands():
        program, *arguments = shlex.split(line)
        seen += 1
        if program == "make":
            assert arguments[0] in targets
        elif program == "torchrun":
            run([sys.executable, "-m", "torch.distributed.run", *arguments], place)
        elif arguments[0] == "bench" and len(arguments) == 2:  # whole benchmarks take longer than a test may
            assert arguments[1] in BENCHMARKS
        elif arguments[0] == "serve":
            serve(arguments, place)
        else:
            assert program == "ecdit", line
            done = ecdit(*arguments, cwd=place)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert seen > 8
    for _, block in blocks("python"):
        run([sys.executable, "-c", f"{GUARD}\n{block}"], place)
    assert (place / "runs/quickstart/heatmap.png").exists()


def test_parts_of_recipes_are_valid(tmp_path):
    for page, block in blocks("yaml"):
        values = yaml.safe_load(block)
        if not values.keys() & Recipe.model_fields.keys():
            continue  # a file of another kind
        values["extends"] = str(ROOT / "recipes" / values.get("extends", "m_64e.yaml"))
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        assert load_recipe(tmp_path / "recipe.yaml"), page


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
