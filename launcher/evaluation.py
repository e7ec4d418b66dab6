"""Starts the evaluations that training asks for: in the background of its node, or as a job of their own."""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ecdit.evaluate.wanted import arguments
from ecdit.recipe import Recipe
from ecdit.run import Run
from ecdit.status import SUPERVISED
from launcher import slurm
from parallel.job import outside

SECONDS_TO_END, LOWEST_PRIORITY = 10, 19


class Processes:
    """Evaluations as processes on this node. See `ecdit.callbacks.evaluation.Starter`.

    In the background they are at the lowest priority, without a GPU and on one core, and end with the training."""

    def __init__(self, recipe: Recipe, *, background: bool):
        self._recipe, self._background = recipe, background

    def start(self, run: Run, step: int) -> "Process":
        """A process, or one for each of `evaluation.tasks`."""
        ranks, words = self._recipe.evaluation.tasks, arguments(self._recipe, run, step)
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        if self._background and self._recipe.train.linears != "torch":
            words.append("train.linears=torch")  # Transformer Engine's need a GPU
        return self.process([sys.executable, *many, "-m", "ecdit.cli", *words], run, step)

    def process(self, command: list[str], run: Run, step: int) -> "Process":
        """A command, apart from this process's job; what it says goes into the run's logs."""
        environment = outside() | {"PYTHONUNBUFFERED": "1"}
        environment.pop(SUPERVISED, None)
        if self._background:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        log = log_of(run, step)
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if self._background:
            os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST_PRIORITY)
        return Process(process, log, outlives=not self._background)

    def alive(self, identity: dict[str, Any]) -> bool:
        """Whether the process is on this node and runs."""
        if identity.get("host") != socket.gethostname():
            return False
        try:
            os.kill(identity["process"], 0)
        except (OSError, KeyError):
            return False
        return True


class Process:
    """See `ecdit.callbacks.evaluation.Task`."""

    pause = 1.0

    def __init__(self, process: subprocess.Popen, log: Path, *, outlives: bool):
        self._process, self.log, self.outlives = process, log, outlives
        self.identity = {"host": socket.gethostname(), "process": process.pid}

    def ended(self) -> bool:
        """Whether it has exited."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """With all that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(SECONDS_TO_END)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


class Jobs:
    """Evaluations as SLURM's jobs. See `ecdit.callbacks.evaluation.Starter`."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe

    def start(self, run: Run, step: int) -> "Job":
        """Submits one. Raises UserError with what sbatch says."""
        log, script = log_of(run, step), run.folder / f"evaluate/step-{step}/job.slurm"
        script.write_text(render(self._recipe, run, step, log), encoding="utf-8")
        return Job(slurm.submit(script, environment=outside()), log)

    def alive(self, identity: dict[str, Any]) -> bool:
        """Whether SLURM still has it to do."""
        return slurm.alive(identity.get("job"))


class Job:
    """See `ecdit.callbacks.evaluation.Task`."""

    pause, outlives = 10.0, True

    def __init__(self, number: str, log: Path):
        self._number, self.log, self.identity = number, log, {"job": number}

    def ended(self) -> bool:
        """Whether SLURM has nothing more to do for it."""
        return not slurm.alive(self._number)

    def stop(self) -> None:
        """It goes on."""


def starter(recipe: Recipe) -> Processes | Jobs:
    """What `evaluation.where` asks for; jobs where there is a SLURM."""
    if recipe.evaluation.where == "job" and shutil.which("sbatch"):
        return Jobs(recipe)
    return Processes(recipe, background=recipe.evaluation.where == "background")


def log_of(run: Run, step: int) -> Path:
    """What an evaluation says."""
    folder = run.folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"evaluate-step-{step}.log"


def render(recipe: Recipe, run: Run, step: int, log: Path) -> str:
    """The batch file: one node, with as many tasks as the recipe says, and a GPU each where its nodes have any."""
    tasks = recipe.evaluation.tasks
    cluster = recipe.cluster.model_copy(
        update={
            "nodes": 1,
            "min_nodes": None,
            "tasks_per_node": tasks,
            "gpus_per_node": tasks if recipe.cluster.gpus_per_node else 0,
            "exclusive": False,
        }
    )
    lines = [
        "#!/bin/bash",
        f"# Evaluates step {step} of {run.folder}, rendered while it trains.",
        *(f"#SBATCH {option}" for option in slurm.options(f"{recipe.run}-evaluate-{step}", cluster, str(log))),
        "",
        *cluster.setup,
        f"export OMP_NUM_THREADS={cluster.cpus_per_task} PYTHONUNBUFFERED=1",
        *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
        "",
        f"exec {shlex.join([*slurm.srun(cluster, os.getcwd()), 'ecdit', *arguments(recipe, run, step)])}",
    ]
    return "\n".join(lines) + "\n"
