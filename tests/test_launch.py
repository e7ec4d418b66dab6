"""Jobs without a cluster: batch files, a process's place in a job, and what the supervisor makes of how a run ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ecdit.callbacks.metrics import JsonLines
from ecdit.cli import app
from ecdit.data.prepare import prepare_shapes
from ecdit.errors import UserError
from ecdit.recipe_io import load_recipe
from ecdit.run import Run
from ecdit.status import read_status, update_status
from ecdit.train import train
from launcher import preflight, slurm
from launcher.launch import batch_file, for_nodes
from launcher.plan import plan
from launcher.plan.gpus import load
from launcher.plan.search import nearest
from launcher.scale import Study
from launcher.supervise import judge
from parallel.job import JobError, adopt_slurm, expand_tasks, under_srun
from parallel.watchdog import Watchdog
from tests.command import ecdit
from tests.ranks import free_port
from tests.test_train import TINY, complaint

ROOT = Path(__file__).parents[1]
RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.name != "base.yaml"]
PATIENCE = 120


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch") / "shapes"
    prepare_shapes(folder, count=40, seed=0)
    return f"data.streams=[{{path: {folder}}}]"


# ---------------------------------------------------------------------------------------------------------- batch files


def test_the_batch_files_are_what_the_recipes_render_to():
    """`ecdit launch RECIPE --render` writes one anew."""
    rendered = slurm.render_all(ROOT / "recipes")
    assert len(rendered) == len(RECIPES) == len(list((ROOT / "recipes").glob("*.slurm")))
    for path, text in rendered.items():
        assert path.read_text() == text, path
        assert text.count("\n") < 30


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_cluster(path):
    recipe = load_recipe(path)
    if path.stem == "quickstart":  # on several nodes the job shares its batch out
        recipe = nearest(recipe, recipe.cluster.nodes * recipe.cluster.tasks, recipe.cluster.tasks)
    made = plan(recipe, recipe.cluster.nodes, recipe.cluster.tasks, load(recipe.cluster.gpu))
    assert made.margin > 0.05 * made.capacity


def test_a_batch_file_has_what_the_recipe_says(tmp_path):
    keys = ["cluster.partition=big", "cluster.account=me", "cluster.options=[--qos=high]", "cluster.container=img.sqsh"]
    keys += ["cluster.environment={NCCL_DEBUG: WARN}", "cluster.setup=[module load cuda]", "cluster.nodes=4"]
    done = ecdit("launch", ROOT / "recipes/xl_8e.yaml", "--dry-run", *keys, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in (
        "#SBATCH --nodes=4", "#SBATCH --partition=big", "#SBATCH --account=me", "#SBATCH --qos=high",
        "#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "module load cuda", "export NCCL_DEBUG=WARN",
        "#SBATCH --output=runs/xl_8e/logs/slurm-%j.log",
    ):  # fmt: skip
        assert line in done.stdout.splitlines(), line
    assert "--container-image=img.sqsh" in done.stdout and '"--container-mounts=$PWD:$PWD"' in done.stdout
    assert ".venv" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_blank_in_a_folders_name_ends_no_option(tmp_path):
    done = ecdit("launch", ROOT / "recipes/xl_8e.yaml", "--dry-run", "--runs", "my runs", cwd=tmp_path)
    assert "#SBATCH --output='my runs/xl_8e/logs/slurm-%j.log'" in done.stdout.splitlines(), done.stderr


def test_fewer_nodes_are_a_valid_job_or_refused(tmp_path):
    file = ROOT / "recipes/quickstart.yaml"
    recipe, keys, layout = for_nodes(file, ["run=one"], 1)
    assert layout == []
    assert for_nodes(file, [], 2)[2] != []
    assert keys == ["run=one", "cluster.nodes=1", "cluster.min_nodes=1"]
    assert "#SBATCH --nodes=1\n" in batch_file(file, recipe, keys, tmp_path)
    told = complaint(ecdit("launch", file, "--nodes", 3, "--dry-run"))
    assert "no layout of this model and train.batch: 16" in told
    with pytest.raises(UserError, match=r"cluster.min_nodes: 5 is over nodes: 2"):
        for_nodes(file, ["cluster.min_nodes=5"], None)


# ------------------------------------------------------------------------------------------------------- a rank's place


def srun_task(**more):
    return {
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "node7", "SLURM_JOB_ID": "12",
        "SLURM_STEP_ID": "0",
    } | more  # fmt: skip


def test_a_task_of_srun_takes_its_place():
    environ = srun_task()
    adopt_slurm(environ)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [environ[name] for name in names] == ["3", "4", "1", "2", "node7", "20084"]
    assert under_srun(environ)


@pytest.mark.parametrize(
    "environ", [{}, {"SLURM_PROCID": "0"}, srun_task(SLURM_STEP_NUM_TASKS="1"), srun_task(RANK="0")]
)
def test_elsewhere_nothing_is_adopted(environ):
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_tasks_of_nodes_are_read_as_slurm_writes_them():
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]


def test_without_scontrol_the_meeting_place_has_to_be_given(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobError, match="set MASTER_ADDR"):
        adopt_slurm(srun_task(SLURM_STEP_NODELIST="node[1-2]"))


# -------------------------------------------------------------------------------------------------------------- judging

CLUSTER = load_recipe(ROOT / "recipes/quickstart.yaml", ["cluster.crashes=3", "cluster.back_off_seconds=10"]).cluster


def crashed(checkpoint=0, *before, kind="crash", why="boom", words="", code=1):
    status = {"state": "running", "checkpoint": checkpoint, "crashes": list(before)}
    if kind is not None:
        status["failure"] = {"kind": kind, "why": why}
    return judge(status, code, words, CLUSTER)


def test_a_run_that_ends_well_is_finished_and_one_that_was_stopped_is_requeued():
    assert judge({"state": "finished", "checkpoint": 9}, 0, "", CLUSTER)[0].state == "finished"
    verdict, crashes = judge({"state": "requeue", "why": "SIGUSR1", "checkpoint": 9}, 0, "", CLUSTER)
    assert (verdict.state, verdict.why, verdict.delay, crashes) == ("requeued", "SIGUSR1", 0, [])


def test_crashes_without_progress_wait_longer_and_longer_and_then_end_the_run():
    first, crashes = crashed()
    second, crashes = crashed(0, *crashes)
    third, crashes = crashed(0, *crashes)
    assert [(v.state, v.delay) for v in (first, second)] == [("requeued", 10), ("requeued", 20)]
    assert third.state == "failed" and third.why.startswith("3 crashes without a new checkpoint (cluster.crashes: 3)")


def test_progress_forgives_earlier_crashes():
    _, crashes = crashed()
    _, crashes = crashed(0, *crashes)
    verdict, crashes = crashed(100, *crashes)
    assert (verdict.state, verdict.delay, len(crashes)) == ("requeued", 10, 1)


def test_what_would_happen_again_is_not_tried_again():
    for kind in ("bad input", "not finite"):
        assert crashed(kind=kind)[0].state == "failed"
    verdict, _ = crashed(kind=None, code=2, words="ecdit: train.bacth: unknown key; did you mean train.batch?")
    assert (verdict.state, verdict.kind) == ("failed", "bad input") and "train.batch" in verdict.why


def test_running_out_of_memory_and_a_lost_node_are_told_apart():
    killed = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the tasks have been OOM Killed.\n"
    assert crashed(why="Connection closed by peer", words=killed)[0].kind == "out of memory"
    assert crashed(kind="out of memory", why="CUDA out of memory")[0].kind == "out of memory"
    assert crashed(words="srun: error: Node failure on node2\n")[0].kind == "lost"
    verdict, _ = crashed(kind=None, code=139, words="Segmentation fault\nsrun: error: node1: task 0\n")
    assert (verdict.kind, verdict.why) == ("crash", "exit code 139: Segmentation fault")


def test_nodes_that_say_nothing_are_bad():
    output = 'noise\n{"node": "a", "problems": []}\n{"node": "b", "problems": ["disk"]}\n'
    found = preflight.verdicts(output, ["a", "b", "c"])
    assert found == {"b": "disk", "c": f"no answer within {preflight.SECONDS} s"}


def test_a_status_is_whole_whatever_writes_it(tmp_path):
    update_status(tmp_path, state="running", step=1)
    (tmp_path / "status.json").write_text('{"state": "runn')
    assert read_status(tmp_path) == {}
    update_status(tmp_path, state="running")
    assert read_status(tmp_path)["state"] == "running"


# ------------------------------------------------------------------------------------------------------- the real thing


def start(command, *args, **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(
        [sys.executable, *command, *map(str, args)], env=environment, stderr=subprocess.PIPE, text=True
    )


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


LONG = ["train.steps=4000", "checkpoint.every=20", "cluster.back_off_seconds=0"]


def test_a_killed_command_is_started_again_and_a_stopped_one_is_not(shapes, tmp_path):
    train = [sys.executable, "-m", "ecdit.cli", "train"]
    keys = [ROOT / "recipes/quickstart.yaml", *TINY, shapes, *LONG]
    supervisor = start(["-m", "ecdit.cli", "supervise"], *keys, "--runs", tmp_path, "--", *train)
    run = tmp_path / "quickstart"

    def child():
        found = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        return int(found[0]) if found else None

    until(lambda: (run / "checkpoints/latest").exists())
    first = child()
    os.kill(first, signal.SIGKILL)
    until(lambda: child() not in (None, first))
    until(lambda: read_status(run).get("crashes") and read_status(run).get("step", 0) > 20)
    supervisor.terminate()
    _, told = supervisor.communicate(timeout=PATIENCE)
    assert supervisor.returncode == 75, told
    assert "The run goes on (crash): exit code -9" in told and "Resumed from" in told
    assert read_status(run)["state"] == "requeue"


def test_a_rank_that_hangs_ends_the_run_with_everyones_stacks(shapes, tmp_path):
    hang = ["cluster.hang.seconds=10", "cluster.hang.times_median=2"]
    keys = [ROOT / "recipes/quickstart.yaml", *TINY, shapes, *LONG, *hang, "--runs", tmp_path]
    port = free_port()
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, second = (
        start(["-m", "ecdit.cli", "train"], *keys, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in (0, 1)
    )
    run = tmp_path / "quickstart"
    until(lambda: read_status(run).get("step", 0) > 20)
    second.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, told = first.communicate(timeout=PATIENCE)
    second.kill()
    assert time.monotonic() - began < 30 and first.returncode == 1
    assert "no step for" in told
    status = read_status(run)
    assert (status["state"], status["kind"]) == ("failed", "hang")
    stacks = (run / "logs/rank-0.stacks").read_text()
    assert "most recent call first" in stacks and "train.py" in stacks
    assert (run / "logs/rank-0.flight.json").stat().st_size > 1000


def test_the_watch_leaves_a_run_alone_that_steps(tmp_path):
    hung = threading.Event()
    watch = Watchdog(tmp_path / "rank-0.log", times_median=2, seconds=0.5, on_hang=lambda message: hung.set())
    for _ in range(5):
        with watch.step():
            time.sleep(0.05)
    time.sleep(1)  # between steps, such as a picture grid
    watch.close()
    assert not hung.is_set() and not list(tmp_path.glob("*.stacks"))


# ------------------------------------------------------------------------------------------------------ scaling studies


@pytest.mark.parametrize("nodes", ["two", "²", "1,²", "0", "1,,2"])
def test_numbers_of_nodes_are_numbers(nodes):
    error = CliRunner().invoke(app, ["scale", "recipes/quickstart.yaml", "--nodes", nodes]).exception
    assert isinstance(error, UserError) and f"--nodes: {nodes!r}" in str(error)


@pytest.fixture(scope="module")
def scaled(shapes, tmp_path_factory):
    """A study of one node, six steps of which are trained: its recipe's keys, and the folder of its runs."""
    keys, runs = [*TINY, shapes, "run=sc", "cluster.tasks_per_node=1"], tmp_path_factory.mktemp("scale")
    study = scaling(keys, runs)
    assert train(load_recipe(study.file, study._given[1]), study.folder, [JsonLines()]) == 0
    return keys, runs


def scaling(keys, runs, steps=6, nodes=(1,)):
    return Study(ROOT / "recipes/quickstart.yaml", keys, list(nodes), weak=False, steps=steps, runs=runs)


def never(*_args, **_keys):
    raise AssertionError("a run was started")


@pytest.mark.parametrize(
    ("key", "steps", "told"),
    [
        ("optimizer.lr=1e-5", 7, "optimizer.lr: 0.003 in the run, 1e-05 asked for"),
        ("train.batch=16", 6, "train.batch: 8 in the run, 16 asked for"),
        ("train.micro_batch=8", 6, "train.micro_batch: 4 in the run, 8 asked for"),
        ("cluster.gpu=a100", 6, "cluster.gpu: 'h100' in the run, 'a100' asked for"),
        ("sample.steps=5", 50, "train.steps: 6 in the run, 50 asked for"),
    ],
)
def test_a_scaling_study_of_other_keys_is_refused_before_a_run_starts(scaled, key, steps, told, monkeypatch):
    keys, runs = scaled
    monkeypatch.setattr("launcher.scale.subprocess.run", never)
    monkeypatch.setattr("launcher.scale.launch", never)
    study = scaling([*keys, key], runs, steps, nodes=(2, 1))  # that of two nodes has not begun
    for ask in (study.run_here, study.submit, study.gather):
        with pytest.raises(UserError, match=r"sc-strong/nodes-1: .* name with run=, or remove .*nodes-1:") as error:
            ask()
        assert told in str(error.value)


def test_a_scaling_study_of_the_same_keys_is_gathered(scaled, monkeypatch):
    keys, runs = scaled
    monkeypatch.setattr("launcher.scale.subprocess.run", never)
    for more in ([], ["cluster.time=1:00:00", "cluster.partition=long", "log.samples=true"]):
        study = scaling([*keys, *more], runs)
        study.run_here()
        found = study.gather()
        assert found["steps"] == 6 and [row["batch"] for row in found["rows"]] == [8]


def test_a_run_of_a_scaling_study_that_has_nothing_begins_anew_with_any_keys(scaled, tmp_path, monkeypatch):
    keys, _ = scaled
    study, started = scaling([*keys, "optimizer.lr=1e-5"], tmp_path), []
    Run(study.folder / "nodes-1").write_recipe(load_recipe(study.file, keys))
    update_status(study.folder / "nodes-1", state="failed")
    monkeypatch.setattr("launcher.scale.launch", lambda *given: started.append(given))
    study.submit()
    assert len(started) == 1
    update_status(study.folder / "nodes-1", state="running", job="7")
    monkeypatch.setattr("launcher.slurm.alive", lambda job: job == "7")
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.003 in the run, 1e-05 asked for"):  # its job trains it
        study.submit()
