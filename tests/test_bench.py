"""The benchmark command: its report's form. Its figures are in docs/benchmarks.md."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import checkpoint, data, kernels, moe, plan
from ecdit.cli import app


def run(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)])


def test_the_report_has_its_promised_form(tmp_path, monkeypatch):
    for name, small in (("G", 1), ("T", 64), ("D", 16), ("ROUNDS", 2)):
        monkeypatch.setattr(moe, name, small)
    done = run("moe", "--json", tmp_path / "moe.json")
    assert done.exit_code == 0, done.exception
    report = json.loads((tmp_path / "moe.json").read_text())
    assert {"torch", "device"} <= report["machine"].keys()
    assert len(report["rows"]) == 6
    for row in report["rows"]:
        assert row.keys() == {"name", "milliseconds", "against", "ratio"} and row["milliseconds"] > 0
        assert (row["against"] is None) == (row["ratio"] is None)
    assert "EC-DiT layer, E 64" in done.stdout


def test_the_checkpoint_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "MODELS", {"quickstart": (checkpoint.QUICKSTART, 16, 1)})
    found = {row.name: row.milliseconds for row in checkpoint.rows()}
    assert len(found) == 5 and all(milliseconds >= 0 for milliseconds in found.values())
    assert not list(tmp_path.iterdir())


def test_the_planners_benchmark_runs(monkeypatch, capsys):
    model = {"layers": 4, "width": 64, "heads": 4, "kv_heads": 4, "experts": 8, "group_tokens": 256}
    train = {"batch": 8, "micro_batch": 4, "precision": "fp32"}
    monkeypatch.setattr(plan, "CASES", {"small": (model, train, 0.5), "huge": ({"size": "M"}, {"batch": 8}, 0.5)})
    planned, measured = plan.rows()
    assert measured.against == planned.name == "small: planned" and measured.ratio > 0
    assert "huge: " in capsys.readouterr().err


def test_the_kernels_benchmark_runs(monkeypatch, capsys):
    for name, small in (("N", 64), ("T", 32), ("S", 16), ("SLICES", [100]), ("COPIED", 4096), ("ROUNDS", 2)):
        monkeypatch.setattr(kernels, name, small)
    found = kernels.rows()
    assert len([row for row in found if row.name.endswith(": floor")]) == 13
    assert all(row.milliseconds > 0 for row in found)
    assert all(row.against == row.name.replace("twin", "floor") for row in found if row.name.endswith("twin"))
    assert "AdaLN, D 128, forward: spread" in capsys.readouterr().err


def test_an_unknown_benchmark_is_refused():
    assert "'mo' is no benchmark; valid: moe, kernels, checkpoint, plan" in str(run("mo").exception)


@pytest.mark.slow
def test_the_layer_costs_what_an_ffn_of_equal_flops_costs():
    """The targets of the MoE layer on a CPU, on an otherwise idle machine."""
    ratios = {row.name: row.ratio for row in moe.rows() if row.ratio is not None}
    assert ratios["EC-DiT layer, E 16"] <= 1.2
    assert ratios["EC-DiT layer, E 64"] <= 1.3
    assert ratios["Algorithm 1 as printed, E 64"] >= 8


def test_the_loaders_benchmark_runs(monkeypatch):
    monkeypatch.setattr(data, "IMAGES", 128)
    monkeypatch.setattr(data, "ROUNDS", 1)
    rows = {row.name: row for row in data.rows()}
    assert rows["loader, 256x256 JPEG"].against == "PIL, plain loop"
    step = rows["a step of XL-8E, half masked, 50% MFU on an H200"]
    assert 0.5 < step.milliseconds < 2
    cores = rows["cores a GPU: loader, 256x256 JPEG"]
    assert cores.ratio == cores.milliseconds / step.milliseconds
