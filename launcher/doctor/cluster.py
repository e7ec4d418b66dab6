"""What a cluster gives: SLURM, the job that this is in, pyxis, InfiniBand."""

import os
import shutil
from collections import Counter
from pathlib import Path

from launcher.doctor.ask import NoAnswer, ask, last_line
from launcher.doctor.finding import MISSING, OK, WARNING, Finding

PROGRAMS = ("sbatch", "srun", "squeue", "scontrol", "sinfo")
REACH_SECONDS = 5
SLURM, JOB, PYXIS, INFINIBAND = "SLURM", "SLURM job", "pyxis", "InfiniBand"
JOB_WORDS = {
    "SLURM_JOB_ID": "job", "SLURM_JOB_NUM_NODES": "nodes", "SLURM_NTASKS": "tasks",
    "SLURM_GPUS_ON_NODE": "GPUs here", "SLURMD_NODENAME": "on",
}  # fmt: skip


def slurm() -> list[Finding]:
    """Its programs, whether the controller answers, the job, pyxis."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        costs = "no ecdit launch and no ecdit scale over nodes; torchrun and `ecdit scale --local` work"
        pyxis = Finding(PYXIS, MISSING, "no SLURM", "no cluster.container")
        return [Finding(SLURM, MISSING, f"no {', '.join(lacking)}", costs), job(os.environ), pyxis]
    return [_controller(), job(os.environ), _pyxis()]


def _controller() -> Finding:
    costs = "jobs cannot be submitted from here"
    try:
        code, version, _ = ask(["sinfo", "--version"], REACH_SECONDS)
        version = version.strip() if code == 0 else "of unknown version"
        code, output, errors = ask(["sinfo", "--noheader", "--format=%P %D"], REACH_SECONDS)
    except NoAnswer as error:
        return Finding(SLURM, WARNING, f"sinfo: {error}", costs)
    if code:
        return Finding(SLURM, WARNING, last_line(errors) or f"sinfo: exit code {code}", costs)
    return Finding(SLURM, OK, f"{version.removeprefix('slurm ')}; {partitions(output)}")


def partitions(output: str) -> str:
    """From sinfo's lines of a partition (its default has a star) and a number of nodes."""
    nodes = Counter()
    for line in output.splitlines():
        name, _, number = line.partition(" ")
        if number.strip().isdigit():
            nodes[name] += int(number)
    return ", ".join(f"{name} {number} nodes" for name, number in nodes.items()) or "no partition"


def job(environment: dict[str, str]) -> Finding:
    """Of the environment that SLURM gives to a job's tasks."""
    if "SLURM_JOB_ID" not in environment:
        return Finding(JOB, MISSING, "not in a job", "nothing; a compute node is seen by: srun --gpus=1 ecdit doctor")
    found = ", ".join(f"{word} {environment[name]}" for name, word in JOB_WORDS.items() if name in environment)
    if not any(name in environment for name in ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")):
        return Finding(JOB, WARNING, f"{found}, no GPU asked for", "GPUs may be hidden; ask for some: srun --gpus=1")
    return Finding(JOB, OK, found)


def _pyxis() -> Finding:
    costs = "no cluster.container; a virtual environment in cluster.setup works"
    try:
        code, output, errors = ask(["srun", "--help"], REACH_SECONDS)
    except NoAnswer as error:
        return Finding(PYXIS, MISSING, f"srun: {error}", costs)
    if "--container-image" in output:
        return Finding(PYXIS, OK, "srun has --container-image")
    why = last_line(errors) if code else "srun has no --container-image"
    return Finding(PYXIS, MISSING, why or f"srun: exit code {code}", costs)


def infiniband(root: Path = Path("/sys/class/infiniband"), devices: Path = Path("/dev/infiniband")) -> list[Finding]:
    """The ports of its adapters, and whether programs may use them."""
    costs = "nodes talk over TCP, some ten times slower; one node alone is as fast"
    active, down = [], []
    for port in sorted(root.glob("*/ports/*")):
        state, rate = _read(port / "state"), _read(port / "rate")
        if "ACTIVE" in state:
            active.append(f"{rate} {_read(port / 'link_layer')}".strip())
        else:
            down.append(f"{port.parent.parent.name}/{port.name} ({state.split(': ')[-1]})")
    if not active and not down:
        return [Finding(INFINIBAND, MISSING, "no adapter", costs)]
    found = ", ".join(f"{number} x {rate}" for rate, number in Counter(active).items()) or "no active port"
    found += f"; down: {', '.join(down)}" if down else ""
    if not active:
        return [Finding(INFINIBAND, WARNING, found, costs)]
    if not any(devices.glob("uverbs*")):
        what = f"{found}; no {devices}/uverbs*"
        return [Finding(INFINIBAND, WARNING, what, f"{costs}; give the container {devices}")]
    return [
        Finding(INFINIBAND, WARNING if down else OK, found, "less bandwidth, if training used them" if down else "")
    ]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown" if file.name != "link_layer" else ""
