"""What the machine gives: shared memory, limits, the disk, cores and memory."""

import os
import resource
import shutil
from pathlib import Path

import psutil

from launcher.doctor.ask import probe
from launcher.doctor.finding import MISSING, OK, WARNING, Finding

MIB, GIB = 2**20, 2**30
LEAST_SHARED, LEAST_MEMORY, LEAST_DISK = GIB, 4 * GIB, 10 * GIB
LEAST_WRITE = 100e6  # bytes/s
LEAST_FILES, LEAST_PROCESSES = 4096, 4096
DISK_SECONDS = 60


def shared_memory(place: Path = Path("/dev/shm")) -> list[Finding]:
    """Where the reader's processes hand over samples, and NCCL's ranks of a node meet."""
    if not place.is_dir():
        return [Finding("shared memory", MISSING, f"no {place}", "data.workers must be 0, and NCCL is slower")]
    size, _, free = shutil.disk_usage(place)
    return [judge_shared_memory(size, free)]


def judge_shared_memory(size: int, free: int) -> Finding:
    """In bytes."""
    low = free < LEAST_SHARED
    costs = "readers (data.workers) and NCCL may fail; a container takes --shm-size=16g or --ipc=host" if low else ""
    found = f"{free / GIB:.1f} of {size / GIB:.1f} GiB are free"
    return Finding("shared memory", WARNING if low else OK, found, costs)


def limits(adapters: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """Of this process; jobs often have others than shells. InfiniBand's adapters need locked memory."""
    lock = resource.RLIM_INFINITY if any(adapters.glob("*")) else 0
    return [
        judge_limit(
            "open files", resource.getrlimit(resource.RLIMIT_NOFILE), LEAST_FILES, "n",
            "jobs of many ranks run out of sockets and shards",
        ),
        judge_limit(
            "locked memory", resource.getrlimit(resource.RLIMIT_MEMLOCK), lock, "l",
            "InfiniBand cannot be used",
        ),
        judge_limit(
            "processes", resource.getrlimit(resource.RLIMIT_NPROC), LEAST_PROCESSES, "u",
            "readers, compilers and NCCL's threads cannot be started",
        ),
    ]  # fmt: skip


def judge_limit(name: str, limit: tuple[int, int], least: int, letter: str, costs: str) -> Finding:
    """limit: the soft and the hard one. least: RLIM_INFINITY for none but unlimited. letter: ulimit's."""
    soft, hard = limit
    shown = f"{_shown(name, soft)}, at most {_shown(name, hard)}"
    if _reaches(soft, least):
        return Finding(name, OK, shown)
    wanted = "unlimited" if least == resource.RLIM_INFINITY or hard == resource.RLIM_INFINITY else hard
    remedy = f"ulimit -{letter} {wanted}"
    if not _reaches(hard, least):
        goal = "unlimited" if least == resource.RLIM_INFINITY else least
        remedy = f"only an administrator can raise it: {goal} in /etc/security/limits.conf, or in slurmd's unit"
    return Finding(name, WARNING, shown, f"{costs}; {remedy}")


def _reaches(limit: int, least: int) -> bool:
    if limit == resource.RLIM_INFINITY:
        return True
    return least != resource.RLIM_INFINITY and limit >= least


def _shown(name: str, limit: int) -> str:
    if limit == resource.RLIM_INFINITY:
        return "unlimited"
    return f"{limit / MIB:g} MiB" if name == "locked memory" else str(limit)


def disk() -> list[Finding]:
    """The current folder, which is where runs/ is made."""
    return [judge_disk(probe("disk", DISK_SECONDS)["disk"])]


def judge_disk(found: dict) -> Finding:
    """found: bytes that are free, bytes/s."""
    if "error" in found:
        return Finding("disk here", WARNING, found["error"], "no run can be here; take another folder, or --runs")
    shown = f"{found['free'] / GIB:.0f} GiB free, {found['rate'] / 1e6:.0f} MB/s"
    if found["free"] < LEAST_DISK:
        return Finding("disk here", WARNING, shown, "checkpoints may not fit: up to 16 bytes a weight, three are kept")
    if found["rate"] < LEAST_WRITE:
        return Finding("disk here", WARNING, shown, "checkpoints take long: up to 16 bytes a weight")
    return Finding("disk here", OK, shown)


def host(groups: Path = Path("/sys/fs/cgroup")) -> list[Finding]:
    """Cores and memory that this process may use."""
    memory = psutil.virtual_memory()
    return [judge_host(len(os.sched_getaffinity(0)), min(memory.total, group_limit(groups)), memory.available)]


def group_limit(groups: Path) -> int:
    """Bytes that the control group allows, of either version; as good as infinite where it does not say."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (groups / name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return 2**63


def judge_host(cores: int, total: int, free: int) -> Finding:
    """In bytes."""
    free = min(free, total)
    found = f"{cores} cores, {free / GIB:.0f} of {total / GIB:.0f} GiB of memory are free"
    if free < max(LEAST_MEMORY, cores * GIB // 2):
        return Finding("host", WARNING, found, "readers and asynchronous checkpoints may not fit; ask for more memory")
    return Finding("host", OK, found)
