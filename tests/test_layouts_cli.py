"""Layouts and failures as a user meets them: the command under torchrun and under plain environment variables."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ecdit.callbacks.metrics import read_metrics
from ecdit.data.prepare import prepare_shapes
from tests.command import ecdit
from tests.test_train import TINY, complaint

ROOT = Path(__file__).parents[1]
FAIL_ON_RANK_2 = """
import os
from ecdit.cli import main
from ecdit.train import Trainer
launch = Trainer._launch
def broken(self, step, batches):
    if os.environ["RANK"] == "2" and step == 3:
        raise ValueError("a bit has flipped")
    return launch(self, step, batches)
Trainer._launch = broken
main()
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts") / "shapes"
    prepare_shapes(folder, count=40, seed=0)
    return folder


def arguments(shapes, runs, *overrides):
    data = f"data.streams=[{{path: {shapes}}}]"
    model = ["model.layers=4", "log.samples=true", "train.steps=4"]
    return [*map(str, ["train", ROOT / "recipes/quickstart.yaml", *TINY, data, *model, *overrides, "--runs", runs])]


def torchrun(ranks, *command):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *command],
        capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(shapes, tmp_path_factory):
    """The run on one rank."""
    runs = tmp_path_factory.mktemp("alone")
    done = ecdit(*arguments(shapes, runs, "log.grid_every=4"))
    assert done.returncode == 0, done.stderr
    return runs / "quickstart"


LAYOUTS = {
    "tensor 2 x expert 4": ["parallel.tensor=2", "parallel.expert=4", "parallel.sequence=true"],
    "pipeline 2 x expert 2": ["parallel.pipeline=2", "parallel.expert=2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_follows_one_curve_on_any_layout(shapes, alone, tmp_path, layout):
    command = arguments(shapes, tmp_path, "log.grid_every=4", *LAYOUTS[layout])
    launched = torchrun(4, "-m", "ecdit.cli", *command)
    assert launched.returncode == 0, launched.stderr
    run = tmp_path / "quickstart"
    for record, one in zip(read_metrics(run / "metrics.jsonl"), read_metrics(alone / "metrics.jsonl"), strict=True):
        assert record["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert record["unrouted_share"] == pytest.approx(one["unrouted_share"], abs=1e-6)
        assert record["experts_per_token_std"] == pytest.approx(one["experts_per_token_std"], abs=1e-6)
        assert record["sample_ids"] == one["sample_ids"]
    logs = {path.name: path.read_text() for path in (run / "logs").iterdir()}
    assert set(logs) == {"rank-1.log", "rank-2.log", "rank-3.log"}
    assert "rank 3 of 4 on cpu: dp" in logs["rank-3.log"] and "step 4: loss" in logs["rank-3.log"]
    assert (run / "samples/step-4.png").exists()
    # what four ranks saved, one goes on from
    again = ecdit(*arguments(shapes, tmp_path, "train.steps=5"))
    assert again.returncode == 0 and "at step 4" in again.stderr, again.stderr


def test_an_exception_on_one_rank_ends_all_with_its_message_first(shapes, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAIL_ON_RANK_2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(script), *arguments(shapes, tmp_path, "parallel.pipeline=2", "parallel.expert=2")]
    plain = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | plain | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "4"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    _, told = ranks[2].communicate(timeout=200)
    failed = time.monotonic()
    others = [ranks[rank].communicate(timeout=30)[1] for rank in (0, 1, 3)]
    assert time.monotonic() - failed < 30
    assert [process.returncode for process in ranks] == [1, 1, 1, 1]
    assert told.startswith("ecdit: rank 2: Traceback") and "ValueError: a bit has flipped" in told
    assert not any("Traceback" in text for text in others)
    log = (tmp_path / "quickstart/logs/rank-2.log").read_text()
    assert "a bit has flipped" in log


def test_bad_input_is_told_once_and_ends_all_with_2(shapes, alone):
    finished = torchrun(2, "-m", "ecdit.cli", *arguments(shapes, alone.parent, "model.text_width=32", "train.steps=9"))
    assert finished.returncode != 0 and "exitcode  : 2" in finished.stderr
    assert finished.stderr.count("model.text_width: 32 in the recipe, 16 in the checkpoint") == 1


def test_what_the_ranks_do_not_divide_is_refused(shapes, tmp_path):
    message = complaint(ecdit(*arguments(shapes, tmp_path, "parallel.pipeline=2")))
    assert "parallel.tensor x parallel.pipeline: 2 does not divide the 1 ranks of this job" in message
    message = complaint(ecdit(*arguments(shapes, tmp_path, "model.routing=megatron_topk")))
    assert "model.routing: megatron_topk needs a GPU" in message
