"""Evaluation while a run trains: checkpoints are evaluated beside the training, and nothing that befalls it harms."""

import os
import sys
import time
from pathlib import Path

import pytest

from ecdit import UserError, load_recipe
from ecdit.callbacks import Callback
from ecdit.callbacks.evaluation import Attendant, Evaluation
from ecdit.callbacks.metrics import JsonLines, read_metrics
from ecdit.evaluate import held
from ecdit.pictures import read_text
from ecdit.report.page import write_report
from ecdit.report.read import read_runs
from ecdit.run import Run
from ecdit.stop import StopRequest
from ecdit.train import DONE, train
from launcher.evaluation import Process, Processes, render, starter
from parallel.checkpoint.folder import Keep, commit, committed, step_of
from parallel.checkpoint.storage import INDEX
from parallel.job import outside
from tests.tiny_runs import ROOT, TINY, make_shapes

EVERY = ["checkpoint.every=4", "evaluation.every=4", "evaluation.suites=[samples, shapes]", "sample.steps=1"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("callbacks"))


def recipe_of(shapes, *overrides):
    data = f"data.streams=[{{path: {shapes}}}]"
    return load_recipe(ROOT / "recipes/quickstart.yaml", [*TINY, data, *EVERY, *overrides])


class Told(Callback):
    """Keeps what the user would read."""

    def __init__(self):
        self.messages = []

    def on_message(self, message):
        self.messages.append(message)


def test_checkpoints_are_evaluated_beside_the_training(shapes, tmp_path):
    """What a user has at the end: scores and pictures of every step that was due, and the same losses as without."""
    keys = [
        "evaluation.options={n: 1}",
        "checkpoint.keep.last=1",
        "log.prompts=[a star]",
        "checkpoint.asynchronous=true",
    ]
    told = Told()
    for name in ("watched", "alone"):
        recipe = recipe_of(shapes, f"run={name}", *keys)
        callbacks = [JsonLines(), told]
        if name == "watched":
            callbacks.append(Evaluation(recipe, Run(tmp_path / name), starter(recipe), StopRequest()))
        assert train(recipe, tmp_path, callbacks) == DONE
    watched, alone = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("watched", "alone"))
    assert [record["loss"] for record in watched] == [record["loss"] for record in alone]
    text = "\n".join(told.messages)
    assert "Step 4 is evaluated: shapes overall" in text and "Step 8 is evaluated: shapes overall" in text
    (data,) = read_runs([tmp_path / "watched"])
    assert {(s.suite, s.step) for s in data.scores} == {(n, k) for n in ("samples", "shapes") for k in (4, 8)}
    for step in (4, 8):
        picture = tmp_path / f"watched/evaluate/step-{step}/pictures/a-star-0.png"
        assert read_text(picture)["checkpoint"].startswith(f"step {step}, ")
    write_report([tmp_path / "watched"], tmp_path / "report.html")
    assert "Over training" in (tmp_path / "report.html").read_text()
    assert not held.held(Run(tmp_path / "watched"))


# ------------------------------------------------------------------------------------------- what befalls an evaluation


class Commands(Processes):
    """Runs some Python in place of an evaluation, in the same kind of process."""

    def __init__(self, recipe, code):
        super().__init__(recipe, background=True)
        self.code, self.started = code, []

    def start(self, run, step):
        self.started.append(step)
        return self.process([sys.executable, "-c", self.code], run, step)


def saved(run, step, keep=1):
    """A committed checkpoint, with nothing in it."""
    folder = run.checkpoints / f"step-{step}.partial"
    folder.mkdir(parents=True)
    (folder / INDEX).write_bytes(b"")
    commit(run.checkpoints, step, {}, {}, Keep(keep, held=lambda: held.held(run)))


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def attend(shapes, tmp_path):
    """Starts an attendant whose evaluations run `code`."""
    recipe, made = recipe_of(shapes, "train.steps=40"), []

    def start(code):
        commands = Commands(recipe, code)
        made.append(Attendant(recipe, Run(tmp_path / "run"), commands))
        made[-1].start()
        return made[-1], commands, Run(tmp_path / "run")

    yield start
    for attendant in made:
        attendant.finish(now=True)
        attendant.join(20)
        assert not attendant.is_alive()


def test_a_failure_is_told_with_its_last_words(attend):
    attendant, _, run = attend("import sys; print('started'); sys.exit('no such CLIP')")
    saved(run, 4)
    attendant.ask(4)
    wait_for(lambda: attendant.messages)
    (message,) = attendant.messages
    assert message.startswith("The evaluation of step 4 failed: no such CLIP") and "Training goes on" in message
    assert attendant.is_alive() and not held.held(run)


def test_what_cannot_be_started_is_told_with_its_command(attend):
    attendant, commands, run = attend("")
    commands.start = lambda run, step: (_ for _ in ()).throw(UserError("sbatch: Invalid account"))
    saved(run, 4)
    attendant.ask(4)
    wait_for(lambda: attendant.messages)
    (message,) = attendant.messages
    assert "Step 4 is not evaluated: sbatch: Invalid account" in message
    assert f"ecdit evaluate {run.folder} --suite samples,shapes --step 4" in message


def test_a_checkpoint_stays_until_it_is_evaluated_and_one_step_waits(attend):
    attendant, commands, run = attend("import time; time.sleep(600)")
    for step in (4, 8, 12, 16):
        attendant.ask(step)
        saved(run, step)
        if step == 4:
            wait_for(lambda: held.held(run).get(4))
    assert commands.started == [4]
    assert [step_of(folder) for folder in committed(run.checkpoints)] == [4, 16]  # under way, waiting; one is kept
    assert [message.split(":")[0] for message in attendant.messages] == [
        "Step 8 is not evaluated", "Step 12 is not evaluated"
    ]  # fmt: skip
    process = held.held(run)[4]["process"]
    assert os.getpriority(os.PRIO_PROCESS, process) == 19
    attendant.finish(now=True)
    attendant.join(20)
    assert not held.held(run)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_the_next_start_takes_up_what_was_left(attend):
    attendant, first, run = attend("import time; time.sleep(600)")
    saved(run, 4)
    attendant.ask(4)
    wait_for(lambda: held.held(run).get(4))
    _, second, _ = attend("")  # another process would find what the first one left: it is alive, so it is left alone
    time.sleep(0.5)
    assert second.started == []
    attendant.finish(now=True)  # as at a time limit
    attendant.join(20)
    _, third, _ = attend("")
    wait_for(lambda: third.started == [4])
    assert first.started == [4]


def test_a_checkpoint_that_could_not_be_written_is_not_waited_for(attend):
    attendant, commands, run = attend("")
    attendant.ask(4)
    attendant.ask(8)
    saved(run, 8)
    wait_for(lambda: commands.started == [8])


# ----------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluation.suites=[clip]"], "evaluation.options: --suite clip: needs --clip"),
        (["evaluation.options={clop: x}"], "evaluation.options: 'clop' is not known; valid: n, seed, prompts"),
        (["evaluation.options={n: few}"], "evaluation.options: n: 'few' is no whole number from 1 on"),
        (["evaluation.options={n: 0}"], "evaluation.options: n: 0 is no whole number from 1 on"),
        (["evaluation.keys=[model.width=8]"], "evaluation.keys: 'model.width=8': this key belongs to the run"),
        (["evaluation.keys=[parallel.expert=2]"], "evaluation.keys: parallel.expert"),
    ],
)  # fmt: skip
def test_what_would_be_refused_later_is_refused_before_the_first_step(shapes, tmp_path, overrides, told):
    recipe = recipe_of(shapes, *overrides)
    with pytest.raises(UserError) as error:
        Evaluation(recipe, Run(tmp_path), starter(recipe), StopRequest())
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["evaluation.every=6"], "evaluation.every: 6 is no multiple of checkpoint.every: 4, .*; try 8"),
        (["evaluation.tasks=2"], "evaluation.tasks: 2 are for evaluation.where: job"),
        (["evaluation.suites=[beauty]"], "evaluation.suites"),
    ],
)  # fmt: skip
def test_a_recipe_that_contradicts_itself_is_refused(shapes, overrides, told):
    with pytest.raises(UserError, match=told):
        recipe_of(shapes, *overrides)


# ----------------------------------------------------------------------------------------------------------- processes


def test_the_batch_file_of_a_job(shapes, tmp_path):
    recipe = recipe_of(
        shapes, "evaluation.where=job", "evaluation.tasks=8", "evaluation.keys=[parallel.expert=8]",
        "evaluation.options={n: 2, vqa_model: a b}", "cluster.gpus_per_node=4", "cluster.account=us", "model.experts=8",
    )  # fmt: skip
    lines = render(recipe, Run(Path("runs/a")), 4, tmp_path / "log").splitlines()
    for line in (
        "#SBATCH --nodes=1",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --account=us",
        f"#SBATCH --output={tmp_path}/log",
    ):
        assert line in lines
    assert "--exclusive" not in "\n".join(lines) and "--ntasks-per-node=8" in lines[-1]
    told = "ecdit evaluate runs/a parallel.expert=8 --suite samples,shapes --step 4 -n 2 --vqa-model 'a b'"
    assert lines[-1].endswith(told)


def test_a_command_of_its_own_does_not_think_that_it_is_a_rank():
    job = {"RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "n", "SLURM_PROCID": "3", "TORCHELASTIC_RUN_ID": "x"}
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "RANKING": "kept"}
    assert outside(job | kept) == kept


def test_a_job_without_slurm_is_a_process_that_outlives_the_training(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    recipe = recipe_of(shapes, "evaluation.where=job")
    made = starter(recipe)
    assert isinstance(made, Processes)
    task = made.process([sys.executable, "-c", "import time; time.sleep(600)"], Run(tmp_path), 4)
    try:
        assert isinstance(task, Process) and task.outlives and made.alive(task.identity) and not task.ended()
        assert os.getpriority(os.PRIO_PROCESS, task.identity["process"]) == os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        task.stop()
    assert task.ended() and not made.alive(task.identity)
