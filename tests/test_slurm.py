"""Runs on a real SLURM: they finish, are stopped and requeued, lose a node, crash, and change their size.

What is tested is what a user types. Where no SLURM can be started, all of it is skipped with the reason.
"""

import json
import time

import pytest
from PIL import Image

from ecdit.callbacks.metrics import read_metrics
from tests.slurm_lab import SECONDS, Lab, why_not
from tests.test_train import TINY

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
NODES = 4
SMALL = [*TINY, "train.batch=16", "log.samples=true", "log.grid_every=0"]
# long enough to be caught in the middle, and alike however long it is
SLOW = [*SMALL, "train.steps=150", "train.batch=64", "checkpoint.every=10", "optimizer.schedule=constant"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("slurm"), NODES)
    lab("ecdit", "prepare", "shapes", "data/shapes", "--count", "100")
    yield lab
    lab.stop()


def records(lab, run):
    return read_metrics(lab.folder / "runs" / run / "metrics.jsonl")


@pytest.fixture(scope="module")
def undisturbed(lab):
    """The curve of the slow run, trained by one process."""
    lab("ecdit", "train", "recipes/quickstart.yaml", "run=undisturbed", *SLOW)
    return records(lab, "undisturbed")


def same_curve(found, expected):
    assert [record["step"] for record in found] == list(range(1, len(expected) + 1))
    for one, other in zip(found, expected, strict=True):
        assert one["sample_ids"] == other["sample_ids"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3), one["step"]  # other numbers of ranks


@pytest.fixture(scope="module")
def plain(lab):
    """A run that nothing disturbs, on all nodes."""
    lab("sbatch", f"--nodes={NODES}", "recipes/quickstart.slurm", "run=plain", *SMALL)
    return lab.end("plain")


def test_sbatch_trains_over_all_tasks_and_finishes(lab, plain):
    assert plain["state"] == "finished", lab.log("plain")
    assert (plain["ranks"], plain["step"]) == (NODES, 8)
    assert [record["step"] for record in records(lab, "plain")] == list(range(1, 9))
    logs = lab.folder / "runs/plain/logs"
    assert sorted(path.name for path in logs.glob("rank-*.log")) == [f"rank-{rank}.log" for rank in range(1, NODES)]


def test_a_signal_ahead_of_the_limit_then_a_node_lost_and_the_curve_is_that_of_an_undisturbed_run(lab, undisturbed):
    lab("ecdit", "launch", "recipes/quickstart.yaml", "--nodes", "2", "run=moved", "cluster.preflight=false", *SLOW)
    job = lab.wait("moved", lambda status: status.get("step", 0) > 10)["job"]
    lab("scancel", "--signal=USR1", "--batch", job)  # what SLURM sends `cluster.signal_seconds` before the limit
    status = lab.wait("moved", lambda status: status["state"] == "requeued")
    assert (status["why"], status["crashes"]) == ("SIGUSR1", []), lab.log("moved")
    kept = status["step"]
    lab.wait("moved", lambda status: status["state"] == "running" and status["step"] > kept + 20)
    try:
        lab.lose("node2")
        status = lab.end("moved")
    finally:
        lab.boot("node2")
    assert status["state"] == "finished", lab.log("moved")
    assert f"Resumed from runs/moved/checkpoints/step-{kept} " in lab.log("moved")
    same_curve(records(lab, "moved"), undisturbed)


def test_a_crash_loop_stops_with_the_reason(lab):
    broken = ["cluster.crashes=2", "cluster.back_off_seconds=0", "cluster.preflight=false"]
    wrong = "cluster.environment={GLOO_SOCKET_IFNAME: nowhere}"
    lab("ecdit", "launch", "recipes/quickstart.yaml", "run=loop", wrong, *broken, *SMALL)
    status = lab.end("loop")
    assert (status["state"], status["kind"]) == ("failed", "crash"), lab.log("loop")
    assert status["why"].startswith("2 crashes without a new checkpoint (cluster.crashes: 2)")
    assert "nowhere" in status["why"]


def test_a_run_goes_on_with_fewer_nodes(lab, plain):
    keys = ["run=fewer", "cluster.preflight=false", *SMALL]
    lab("ecdit", "launch", "recipes/quickstart.yaml", "--nodes", "2", *keys, "train.steps=5")
    assert lab.end("fewer")["ranks"] == 2
    lab("ecdit", "launch", "recipes/quickstart.yaml", "--nodes", "1", *keys, "train.steps=8")
    status = lab.end("fewer")
    assert (status["state"], status["ranks"], status["step"]) == ("finished", 1, 8), lab.log("fewer")
    found, whole = records(lab, "fewer"), records(lab, "plain")
    assert [record["sample_ids"] for record in found] == [record["sample_ids"] for record in whole]


@pytest.mark.slow
def test_a_bad_node_is_named_and_left_out(lab):
    run = lab.folder / "runs/picky"
    run.mkdir(parents=True)
    lab.on("node2", "mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(run))
    try:
        lab("ecdit", "launch", "recipes/quickstart.yaml", "run=picky", "cluster.back_off_seconds=0", *SMALL)
        status = lab.end("picky")
    finally:
        lab.on("node2", "umount", str(run))
    assert status["state"] == "finished", lab.log("picky")
    assert status["excluded"] == ["node2"]


def test_a_second_job_of_a_run_is_refused(lab):
    lab("ecdit", "launch", "recipes/quickstart.yaml", "run=twice", "cluster.options=[--hold]", *SMALL)
    told = lab("ecdit", "launch", "recipes/quickstart.yaml", "run=twice", *SMALL, code=2)
    job = lab.status("twice")["job"]
    assert f"job {job} trains this run" in told
    lab("scancel", job)


def test_a_scaling_study_fills_its_table_and_plot(lab):
    command = ["ecdit", "scale", "recipes/quickstart.yaml", "--nodes", "1,2", "--steps", "6", "cluster.preflight=false"]
    told = lab(*command, *[key for key in SMALL if not key.startswith("train.steps")])
    folder = lab.folder / "runs/quickstart-strong"
    rows = json.loads((folder / "scaling.json").read_text())["rows"]
    assert [(row["nodes"], row["ranks"], row["batch"]) for row in rows] == [(1, 1, 16), (2, 2, 16)]
    assert rows[0]["efficiency"] == 1 and 0 < rows[1]["efficiency"] < 2
    assert rows[1]["collectives"]["all-reduce"] > 0 and rows[1]["planned"]["collectives"]["reduce-scatter"] > 0
    for row in rows:
        assert row["images_per_s"] > 0 and row["memory"] > 1e8 and row["planned"]["gpu"] == "h100"
    with Image.open(folder / "scaling.png") as picture:
        assert picture.width > 500
    assert "strong scaling, measured (planned for h100)" in told


def test_checkpoints_are_evaluated_by_jobs_of_their_own(lab):
    keys = ["checkpoint.every=4", "evaluation.every=4", "evaluation.where=job", "evaluation.suites=[shapes]"]
    keys += ["evaluation.options={n: 1}", "sample.steps=1", "cluster.preflight=false"]
    lab("ecdit", "launch", "recipes/quickstart.yaml", "--nodes", "1", "run=judged", *SMALL, *keys)
    assert lab.end("judged")["state"] == "finished", lab.log("judged")
    run = lab.folder / "runs/judged"
    files = [run / f"evaluate-shapes-step-{step}.json" for step in (4, 8)]
    deadline = time.monotonic() + SECONDS
    while not all(file.exists() for file in files):
        said = [file.read_text() for file in run.glob("logs/evaluate-*.log")]
        assert time.monotonic() < deadline, f"{lab.log('judged')}\n{said}"
        time.sleep(0.2)
    jobs = [(run / f"evaluate/step-{step}/job.slurm").read_text() for step in (4, 8)]
    assert all("#SBATCH --nodes=1" in job for job in jobs)
    assert "The evaluation of step 8 goes on by itself" in lab.log("judged")


@pytest.mark.slow
def test_a_time_limit_in_the_middle_is_obeyed_by_the_clock(lab, undisturbed):
    """The same as the signal that is sent by hand, but by SLURM's own clock, which it looks at every 30 seconds."""
    keys = ["run=limited", "cluster.preflight=false", "cluster.time='2:00'", "cluster.signal_seconds=60", *SLOW]
    keys += ["train.steps=1000"]
    lab("ecdit", "launch", "recipes/quickstart.yaml", "--nodes", "2", *keys)
    status = lab.wait("limited", lambda status: status["state"] == "requeued")
    assert status["why"] == "SIGUSR1", lab.log("limited")
    status = lab.end("limited")
    assert status["state"] == "finished", lab.log("limited")
    same_curve(records(lab, "limited")[: len(undisturbed)], undisturbed)


@pytest.mark.slow
def test_a_job_whose_first_node_is_lost_is_taken_up_by_slurm(lab):
    """The supervisor is on the first node, so nobody is left to say a word."""
    lab("ecdit", "launch", "recipes/quickstart.yaml", "--nodes", "2", "run=headless", "cluster.preflight=false", *SLOW)
    lab.wait("headless", lambda status: status.get("step", 0) > 20)
    try:
        lab.lose("node1")
        status = lab.end("headless")
    finally:
        lab.boot("node1")
    assert status["state"] == "finished", lab.log("headless")
    assert [crash["kind"] for crash in status["crashes"]] == ["lost"]
