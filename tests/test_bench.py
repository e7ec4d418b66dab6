"""The benchmark command: its report's form, its options, and that its peers compute what we do.

Its figures are in docs/benchmarks.md.
"""

import gzip
import json
import time
from contextlib import contextmanager, nullcontext
from dataclasses import fields

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import (
    BENCHMARKS,
    as_table,
    block,
    budget,
    checkpoint,
    data,
    dispatch,
    engines,
    kernels,
    moe,
    plan,
    report,
    sample,
    step,
)
from benchmarks.budget import Asked, Variant
from benchmarks.harness import Row
from benchmarks.peers import PlainBlock
from ecdit import reference
from ecdit.bench_command import NAMES
from ecdit.cli import app
from ecdit.errors import UserError
from parallel import topology
from parallel.spread import Spread
from parallel.topology import Layout
from tests.command import ecdit
from tests.ranks import run_on_ranks

ENDS = ("megatron", "ZeRO-3, all on the host")
KEYS = {field.name for field in fields(Row)}


@pytest.fixture
def small(monkeypatch):
    """Every benchmark in a second or so."""
    changes = {
        moe: {"G": 1, "T": 64, "CASES": ((16, 4), (16, 8)), "SECONDS": 0.2},
        block: {"SHAPE": (4, 16, 4, 32, 4, 2, 4, 32), "SECONDS": 0.2},
        step: {"SECONDS": 0.1},
        dispatch: {"N": 128, "T": 64, "D": 16, "SECONDS": 0.1},
        sample: {"STEPS": 2, "PICTURES": 2, "WARM_UP": 1, "SECONDS": 0.1},
        budget: {"SIDE": {"cpu": 64}, "COPIED": {"cpu": 4096}, "MOST_ROUNDS": 5},
    }
    for module, values in changes.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    yield
    topology.stop()


def run(*args):
    return CliRunner().invoke(app, ["bench", *map(str, args)], env={"COLUMNS": "240"})


def of(rows):
    return {row.name: row for row in rows}


def test_the_report_has_its_promised_form(tmp_path, small):
    done = run("moe", "--json", tmp_path / "moe.json")
    assert done.exit_code == 0, done.exception
    made = json.loads((tmp_path / "moe.json").read_text())
    assert {"torch", "device"} <= made["machine"].keys()
    rows = {row["name"]: row for row in made["rows"]}
    assert len(rows) == 9  # of both cases: layer, dense, megatron-core's, Algorithm 1; the product has one name
    for row in rows.values():
        assert row.keys() == KEYS
        assert (row["milliseconds"] is None) == (row["failed"] is not None)
        assert row["ratio"] is None or row["against"] in rows
    layer = rows["EC-DiT layer, D 16, E 8"]
    low, high = layer["spread"]
    assert low <= layer["milliseconds"] <= high and layer["against"] == "dense FFN of equal FLOPs, D 16, E 8"
    flops = 1e9 * layer["milliseconds"] * layer["about"]["TFLOP/s"]
    assert flops == pytest.approx(3 * 2 * 2 * 64 * 8 * 16**2)  # thrice two products over twice the tokens
    assert "EC-DiT layer, D 16, E 8" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has what is wanted")
def test_what_cannot_be_had_is_told_in_its_row(small):
    done = run("moe")
    assert done.exit_code == 0
    line = next(line for line in done.stdout.splitlines() if "megatron-core's" in line)
    assert "failed: RuntimeError: needs a GPU" in line


def test_a_variant_that_fails_does_not_end_the_others(small):
    down = []

    def variant(name, step, against=None):
        @contextmanager
        def ready():
            yield step
            down.append(name)

        return Variant(name, ready, against, flops=1.0)

    calls = iter(range(1000))

    def breaks():
        if next(calls) >= 2:
            raise ValueError("tired\nand more")

    made = [variant("works", lambda: None, "breaks"), variant("breaks", breaks), variant("never", lambda: 1 / 0)]
    rows = of(budget.compare(made, 0.01, torch.float32))
    assert rows["breaks"].failed == "ValueError: tired" and rows["never"].failed.startswith("ZeroDivisionError")
    assert rows["works"].milliseconds > 0 and rows["works"].ratio is None
    assert sorted(down) == ["breaks", "never", "works"]
    alone = budget.compare_apart([variant("never", lambda: 1 / 0)], 0.01, torch.float32)
    assert [row.name for row in alone] == ["never"]
    as_table({"machine": {}, "rows": [vars(row) for row in rows.values()]})


def test_apart_or_in_turn_a_ratio_is_to_the_peer(small):
    made = [
        Variant("slow", lambda: nullcontext(lambda: time.sleep(0.02)), "fast"),
        Variant("fast", lambda: nullcontext(lambda: time.sleep(0.005))),
    ]
    for way in (budget.compare, budget.compare_apart):
        rows = of(way(made, 0.2, torch.float32))
        assert 2 < rows["slow"].ratio < 4.5 and rows["fast"].ratio is None


@pytest.mark.parametrize("sparse", [False, True])
def test_the_block_in_plain_torch_computes_what_ours_does(small, sparse):
    ours = block._block(Spread(), sparse)
    plain = PlainBlock(reference.Config(1, 32, 4, 2, experts=4), sparse)
    plain.load_state_dict(ours.state_dict())
    mask = torch.ones(4, 1, 1, 4, dtype=torch.bool)
    mask[..., 2:] = False
    inputs = block._inputs()
    torch.testing.assert_close(plain(*inputs, mask, 32), ours(*inputs, mask, 32)[0], rtol=1e-4, atol=1e-5)


def test_blocks_dispatch_and_sampling_are_measured(small):
    rows = of(block.rows())
    assert rows["expert-choice block"].ratio > 0 and rows["dense block"].about["of the product's rate"] > 0
    rows = of(dispatch.rows())
    forward = rows["gather, float32, forward"]
    assert forward.about["GB/s"] == pytest.approx(1e-6 * 3 * 128 * 16 * 4 / forward.milliseconds)
    assert rows["gather in FP8, forward"].against == forward.name
    rows = of(sample.rows(Asked(steps=3)))
    found = rows["quickstart-8E, 2 pictures of 3 steps"]
    assert found.about["overhead"] == found.ratio - 1
    assert found.about["s a picture"] == found.milliseconds / 2000
    assert found.about["overhead of operations"] == pytest.approx(0.248, abs=1e-3)


def test_only_what_is_asked_for_is_measured(small):
    rows = of(moe.rows(Asked(only=("EC-DiT layer, D 16, E ?", "dense FFN*E 8"))))
    product = "product of matrices, float32, the best"
    assert rows.keys() == {product, "EC-DiT layer, D 16, E 4", "EC-DiT layer, D 16, E 8"} | {
        "dense FFN of equal FLOPs, D 16, E 8"
    }
    alone, beside = rows["EC-DiT layer, D 16, E 4"], rows["EC-DiT layer, D 16, E 8"]
    assert alone.against is None and alone.ratio is None and beside.ratio > 0
    done = run("step", "recipes/quickstart.yaml", "model.layers=2", "train.batch=32", "--only", "*launched")
    assert done.exit_code == 0 and "as it is launched" in done.stdout


def test_a_profile_of_a_training_step_has_the_layers_parts(tmp_path, small):
    trace = tmp_path / "trace.json.gz"
    done = run("step", "recipes/quickstart.yaml", "model.layers=2", "train.batch=32", "--profile", trace)
    assert done.exit_code == 0, done.exception
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"_Dispatch", "_Combine", "_CombineBackward", "ecdit::give_back"} <= names
    assert "quickstart: as it is launched" in done.stdout and "images/s" in done.stdout


def test_a_recipes_step_is_a_few_micro_batches_on_one_rank(small):
    found = step.bench_recipe(step.RECIPES / "xl_8e.yaml", ())
    assert (found.train.batch, found.train.micro_batch, found.parallel.expert) == (512, 128, 1)
    launched = step.bench_recipe(step.RECIPES / "xl_8e.yaml", ("optimizer.name=adamw",))  # which no graph goes with
    assert not launched.train.graph
    found = step.bench_recipe(step.RECIPES / "quickstart.yaml", ("train.micro_batch=8",))
    assert found.train.batch == 16


@pytest.mark.parametrize(
    "args, message",
    [
        (("mo",), "'mo' is no benchmark; valid: moe, block, step, dispatch, sample, kernels"),
        (("moe", "--steps", 3), "--steps: not for moe, but for sample"),
        (("plan", "--profile", "x.json"), "--profile: not for plan, but for moe, block, step, dispatch, sample"),
        (("block", "recipes/quickstart.yaml"), "RECIPE: not for block, but for step"),
        (("moe", "--profile", "nowhere/x.json"), "--profile: nowhere/x.json: there is no folder nowhere"),
        (("moe", "--json", "nowhere/x.json"), "--json: nowhere/x.json: there is no folder nowhere"),
        (("block", "--only", "none*"), "--only: 'none*' is like none of what is measured: expert-choice block; "),
        (
            ("step", "recipes/quickstart.yaml", "--only", "none*"),
            "none*' is like none of what is measured: quickstart: as",
        ),
        (("sample", "--only", "none*"), "--only: 'none*' is like none of what is measured: quickstart-8E, "),
        (("kernels", "--only", "*"), "--only: not for kernels, but for moe, block, step, sample"),
        (("moe", "--profile", "tests"), "--profile: tests: is a folder; valid: the name of a file"),
        (("moe", "--json", "tests"), "--json: tests: is a folder; valid: the name of a file"),
        (("step", "nowhere.yaml"), "nowhere.yaml: cannot read this recipe"),
        (("step", "recipes/quickstart.yaml", "model.with=3"), "model.with: unknown key"),
    ],
)
def test_what_cannot_be_asked_is_refused(args, message):
    assert message in str(run(*args).exception)


def test_a_refusal_is_one_message_and_code_2():
    done = ecdit("bench", "moe", "--steps", 3)
    assert (done.returncode, done.stderr) == (2, "ecdit: --steps: not for moe, but for sample\n")
    assert ecdit("bench", "moe", "--seconds", 0).returncode == 2


def between_ranks():
    for name, value in {"N": 128, "T": 64, "D": 16, "SECONDS": 0.1}.items():
        setattr(dispatch, name, value)
    made = report("dispatch")
    topology.stop()
    return [row["name"] for row in made["rows"]], made["rows"]


def refuse_and_fail():
    topology.start(Layout(), 1.0)
    told = {"refused": UserError("train.graph: refused"), "broken": ZeroDivisionError("alone")}

    def raising(name):
        raise told[name]

    def compare(name):
        return budget.compare([Variant(name, lambda: nullcontext(lambda: raising(name)))], 0.1, torch.float32)

    (refused,) = compare("refused")
    with pytest.raises(ZeroDivisionError):
        compare("broken")
    topology.stop()
    return refused.failed


def test_what_one_rank_alone_may_fail_at_ends_the_job():
    """The others would wait for it for ever. What every rank refuses alike is a finding."""
    assert run_on_ranks(refuse_and_fail, 2) == ["train.graph: refused"] * 2


@pytest.mark.slow
def test_two_ranks_measure_the_all_to_all():
    (names, rows), (others, _) = run_on_ranks(between_ranks, 2)
    assert names == others
    found = {row["name"]: row for row in rows}
    assert all(row["failed"] is None for row in rows)
    assert "of the way hidden" in found["gather, all-to-all, combine, float32, with experts, 2 chunks"]["about"]


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
    assert len([row for row in found if row.name.endswith(": floor")]) == 21
    assert all(row.milliseconds > 0 for row in found)
    assert all(row.against == row.name.replace("twin", "floor") for row in found if row.name.endswith("twin"))
    assert "AdaLN, D 128, forward: spread" in capsys.readouterr().err


def test_an_engine_that_fails_has_a_row_that_says_why(monkeypatch):
    def measure(recipe):
        if recipe.engine_options.offload_weights == "cpu":
            raise RuntimeError("out of memory\nsomewhere")
        return 0.5 if recipe.engine == "megatron" else 0.75, 2 << 30, 3 << 30

    monkeypatch.setattr(engines, "measure", measure)
    monkeypatch.setattr(engines, "ENGINES", {name: engines.ENGINES[name] for name in (*ENDS, "ZeRO-2")})
    megatron, failed, other = engines.rows()
    assert (megatron.milliseconds, megatron.about["GiB"], megatron.about["GiB that the allocator held"]) == (500, 2, 3)
    assert failed.failed == "RuntimeError: out of memory" and failed.milliseconds is None
    assert (other.against, other.ratio) == ("megatron", 1.5) and other.about["ms planned"] > 0


def test_the_command_names_every_benchmark():
    assert NAMES.split(", ") == list(BENCHMARKS)


@pytest.mark.slow
def test_the_layer_costs_what_an_ffn_of_equal_flops_costs():
    """The targets of the MoE layer on a CPU, on an otherwise idle machine."""
    ratios = {row.name: row.ratio for row in moe.rows() if row.ratio is not None}
    assert ratios["EC-DiT layer, D 256, E 16"] <= 1.2
    assert ratios["EC-DiT layer, D 256, E 64"] <= 1.3
    assert ratios["Algorithm 1 as printed, D 256, E 64"] >= 8


def test_the_loaders_benchmark_runs(monkeypatch):
    monkeypatch.setattr(data, "IMAGES", 128)
    monkeypatch.setattr(data, "ROUNDS", 1)
    rows = {row.name: row for row in data.rows()}
    assert rows["loader, 256x256 JPEG"].against == "PIL, plain loop"
    step = rows["a step of XL-8E, half masked, 50% MFU on an H200"]
    assert 0.5 < step.milliseconds < 2
    cores = rows["cores a GPU: loader, 256x256 JPEG"]
    assert cores.ratio == cores.milliseconds / step.milliseconds
