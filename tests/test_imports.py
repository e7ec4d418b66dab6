"""Imports point one way, launcher -> ecdit -> parallel, and megatron.training is never among them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "parallel": {"ecdit", "launcher", "benchmarks"},
    "ecdit": {"launcher"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    # the command itself stands above all three
    files = sorted(path for path in (ROOT / package).rglob("*.py") if path != ROOT / "ecdit/cli.py")
    assert files
    for path in files:
        for name in imported(path):
            assert name.split(".")[0] not in FORBIDDEN[package], f"{path} imports {name}"


def test_megatron_training_is_never_imported():
    for path in [
        path for package in ("ecdit", "parallel", "launcher", "benchmarks") for path in (ROOT / package).rglob("*.py")
    ]:
        assert not any(name.startswith("megatron.training") for name in imported(path)), path


def test_reading_a_recipe_costs_no_import_of_torch():
    code = "import sys, ecdit; ecdit.load_recipe('recipes/quickstart.yaml'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
