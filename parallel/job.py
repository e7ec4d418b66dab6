"""A process's place in its job, from whoever started it: torchrun, or srun with one task a rank.

Imports nothing heavy: the command asks before it imports torch.
"""

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping

FIRST_PORT, PORTS = 20_000, 20_000
# what torchrun, srun and sbatch tell a job's processes of their place, but for where SLURM itself is
OF_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
OF_JOBS = ("GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")
OF_SITE = "SLURM_CONF"


class JobError(Exception):
    """The environment does not say where the ranks meet."""


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """Where srun started this process with others, sets what torchrun would have set: RANK, WORLD_SIZE, ...

    Does nothing where RANK is set already, outside of srun, and for a step of a single task. Ranks meet on the job's
    first node, unless MASTER_ADDR and MASTER_PORT say otherwise. Raises JobError where that node cannot be found out.
    """
    if not under_srun(environ) or "RANK" in environ:
        return
    environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    tasks = expand_tasks(environ["SLURM_STEP_TASKS_PER_NODE"])
    environ["LOCAL_WORLD_SIZE"] = str(tasks[int(environ["SLURM_NODEID"])])
    if "MASTER_ADDR" not in environ:
        environ["MASTER_ADDR"] = _first_host(environ["SLURM_STEP_NODELIST"])
    number = int(environ["SLURM_JOB_ID"]) * 7 + int(environ["SLURM_STEP_ID"])
    environ.setdefault("MASTER_PORT", str(FIRST_PORT + number % PORTS))


def outside(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for a command that is no part of this process's job, though it may be on its node."""
    told = {name for name in environ if name in OF_JOB or name.startswith(OF_JOBS)} - {OF_SITE}
    return {name: value for name, value in environ.items() if name not in told}


def under_srun(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several tasks of an srun, which cannot pass on a task's exit code."""
    return int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ


def expand_tasks(text: str) -> list[int]:
    """Tasks of each node: "2(x3),1" -> [2, 2, 2, 1]."""
    counts = []
    for tasks, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    return counts


def _first_host(nodes: str) -> str:
    if re.fullmatch(r"[\w.-]+", nodes):
        return nodes
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise JobError(
            f"cannot find out the first of the nodes {nodes} without scontrol; "
            "set MASTER_ADDR to it before srun, as recipes/*.slurm do"
        ) from None
    return found.stdout.split()[0]
