"""SLURM: batch files rendered from recipes, jobs that are submitted, looked at and requeued."""

import os
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ecdit.errors import UserError
from ecdit.recipe import ClusterRecipe, Recipe
from ecdit.recipe_io import load_recipe

LOG = "%x-%j.log"  # name and number of the job
WAIT_AFTER_EXIT = 60  # seconds that tasks have to end in once one has
UNDER_WAY = ("PENDING", "RUNNING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "SUSPENDED")


# ------------------------------------------------------------------------------------------------------------ rendering


def render(recipe: Recipe, file: str, overrides: tuple[str, ...] = (), log: str = LOG, runs: str = "runs") -> str:
    """The batch file of a recipe. `file`: the recipe's path as the job shall read it, from where sbatch is typed."""
    cluster = recipe.cluster
    where = [] if runs == "runs" else ["--runs", runs]
    supervise = shlex.join(["ecdit", "supervise", file, *overrides, *where])
    lines = [
        "#!/bin/bash",
        f"# {recipe.run} on {_count(cluster.nodes, 'node')}, rendered from {Path(file).name} by `ecdit launch`: change",
        "# that, not this. Further keys may follow the name of this file: sbatch FILE train.steps=1000",
        *(f"#SBATCH {option}" for option in options(recipe.run, cluster, log)),
        "",
        *cluster.setup,
        f"export OMP_NUM_THREADS={cluster.cpus_per_task} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1",
        *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
        "",
        "# checks the nodes, chooses the layout for those that are there, requeues the job until the run is done",
        f'exec {supervise} "$@" -- \\',
        f"  {' '.join(_quoted(word) for word in srun(cluster, '$PWD'))} ecdit train",
    ]
    return "\n".join(lines) + "\n"


def options(name: str, cluster: ClusterRecipe, log: str) -> list[str]:
    """What sbatch is told. Tasks are left to srun, so that a job may start again on fewer nodes."""
    nodes = cluster.nodes if cluster.min_nodes in (None, cluster.nodes) else f"{cluster.min_nodes}-{cluster.nodes}"
    found = [f"--job-name={name}", f"--nodes={nodes}"]
    if cluster.gpus_per_node:
        found.append(f"--gpus-per-node={cluster.gpus_per_node}")
    found.append(f"--cpus-per-task={cluster.tasks * cluster.cpus_per_task}")
    found += ["--exclusive", "--mem=0"] if cluster.exclusive else []
    found += [f"--partition={cluster.partition}"] if cluster.partition else []
    found += [f"--account={cluster.account}"] if cluster.account else []
    return [
        *found,
        *cluster.options,
        f"--time={cluster.time}",
        f"--signal=B:USR1@{cluster.signal_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={shlex.quote(log)}",
    ]


def srun(cluster: ClusterRecipe, folder: str, tasks: int | None = None) -> list[str]:
    """What starts `tasks` on each node, as many as the recipe has if not given; `folder`: the one to start them in."""
    tasks = tasks or cluster.tasks
    command = [
        "srun",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cluster.tasks * cluster.cpus_per_task // tasks}",
    ]
    command += ["--kill-on-bad-exit=1", f"--wait={WAIT_AFTER_EXIT}"]
    if cluster.container is not None:
        command += [f"--container-image={cluster.container}", f"--container-mounts={folder}:{folder}"]
        command.append(f"--container-workdir={folder}")
    return command


def _quoted(word: str) -> str:
    return f'"{word}"' if "$" in word else shlex.quote(word)


def render_all(folder: Path) -> dict[Path, str]:
    """The batch file of every recipe of a folder that is a run."""
    recipes = [path for path in sorted(folder.glob("*.yaml")) if path.name != "base.yaml"]
    return {path.with_suffix(".slurm"): render(load_recipe(path), f"{folder.name}/{path.name}") for path in recipes}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


# ----------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """The job that this process is in."""

    number: str
    nodes: list[str]
    restarts: int

    @staticmethod
    def here() -> "Job | None":
        """From SLURM's environment; None outside of a job."""
        if "SLURM_JOB_ID" not in os.environ:
            return None
        return Job(
            os.environ["SLURM_JOB_ID"],
            hosts(os.environ["SLURM_JOB_NODELIST"]),
            int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        )


def submit(file: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """The number of the submitted job. Raises UserError with what sbatch says."""
    return _call("sbatch", "--parsable", *arguments, str(file), environment=environment).split(";")[0].strip()


def state(number: str) -> str:
    """SLURM's word for the state of a job, such as PENDING or RUNNING; empty where it no longer knows it.

    Unlike squeue's, it tells a job that was requeued from one that was cancelled while both are still ending.
    """
    try:
        shown = _call("scontrol", "--oneliner", "show", "job", number)
    except UserError:  # an unknown number
        return ""
    return dict(word.partition("=")[::2] for word in shown.split()).get("JobState", "")


def alive(number: str | None) -> bool:
    """Whether a job may still run."""
    return number is not None and state(number) in UNDER_WAY


def hosts(nodes: str) -> list[str]:
    """Names of nodes that SLURM writes as node[1-4]."""
    return _call("scontrol", "show", "hostnames", nodes).split()


def limit(nodes: int, tasks: int) -> dict[str, str]:
    """Environment in which srun takes the first `nodes` of the job."""
    return {"SLURM_NNODES": str(nodes), "SLURM_JOB_NUM_NODES": str(nodes)} | {
        name: str(nodes * tasks) for name in ("SLURM_NTASKS", "SLURM_NPROCS")
    }


def requeue(number: str, *, delay_seconds: int, exclude: list[str]) -> None:
    """Starts the job of this process again, which ends the process with all others of the job.

    Raises UserError with what scontrol says, where it refuses.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of the batch script, which must not come before the update
    _call("scontrol", "requeue", number)
    changes = [f"StartTime=now+{delay_seconds}"] if delay_seconds else []
    changes += [f"ExcNodeList={','.join(exclude)}"] if exclude else []
    if changes:
        _call("scontrol", "update", f"JobId={number}", *changes)


def _call(*command: str, environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; this machine has no SLURM") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: SLURM does not answer") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip() or done.returncode}")
    return done.stdout
