"""`ecdit doctor`: what this machine has and lacks for training, and what the lack costs.

Each check is by itself: one that fails says so in its line. What touches a GPU runs in a process of its own with a
time limit, so that a driver that hangs is reported and not suffered.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from rich.markup import escape
from rich.table import Table

OK, MISSING, WARNING, BROKEN = "ok", "missing", "warning", "broken"
PROBE_SECONDS = 120
MIB, GIB = 2**20, 2**30
LEAST_FILES, LEAST_SHARED, LEAST_WRITE = 4096, 1 * GIB, 100e6


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, its state, what was found, and what the lack of it costs or what to do."""

    name: str
    state: str
    found: str
    costs: str = ""


def examine() -> list[Finding]:
    """All checks, in order."""
    return [finding for check in CHECKS for finding in _guarded(check)]


def _guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as error:
        return [Finding(check.__name__.strip("_"), WARNING, f"cannot be told: {type(error).__name__}: {error}")]


def as_table(findings: list[Finding]) -> Table:
    """For the terminal."""
    colours = {OK: "green", MISSING: "yellow", WARNING: "yellow", BROKEN: "red"}
    table = Table("what", "state", "found", "what the lack costs, what to do")
    for one in findings:
        table.add_row(one.name, f"[{colours[one.state]}]{one.state}[/]", escape(one.found), escape(one.costs))
    return table


# ------------------------------------------------------------------------------------------------------------- packages


def _python() -> list[Finding]:
    state = OK if sys.version_info >= (3, 11) else BROKEN
    return [Finding("Python", state, platform.python_version(), "" if state == OK else "3.11 or newer is needed")]


def version_of(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _needed() -> list[Finding]:
    rows = []
    for package in ("torch", "megatron-core", "mosaicml-streaming"):
        version = version_of(package)
        costs = "" if version else "nothing can be trained; pip install 'ecdit'"
        rows.append(Finding(package, OK if version else BROKEN, version or "not installed", costs))
    return rows


OPTIONAL = {  # package: its extra, what its lack costs
    "transformers": ("encoders", "no T5 text encoder; data.text_encoder: hash alone"),
    "diffusers": ("encoders", "no AutoencoderKL; data.autoencoder: pixels alone"),
    "deepspeed": ("deepspeed", "no engine: deepspeed"),
    "wandb": ("wandb", "no log.wandb"),
    "scipy": ("eval", "no suites that need it"),
}


def _optional() -> list[Finding]:
    rows = []
    for package, (extra, costs) in OPTIONAL.items():
        version = version_of(package)
        hint = "" if version else f"{costs}; pip install 'ecdit[{extra}]'"
        rows.append(Finding(package, OK if version else MISSING, version or "not installed", hint))
    return rows


def _apex() -> list[Finding]:
    kind, version = apex_kind(), version_of("apex")
    if kind == "nvidia":
        return [Finding("apex", OK, f"NVIDIA's, {version or 'from source'}")]
    if kind == "other":
        found = f"another package of that name, {version or 'unknown version'}"
        return [Finding("apex", WARNING, found, "it is not NVIDIA's and may confuse libraries; pip uninstall apex")]
    return [Finding("apex", MISSING, "not installed", "nothing of ours needs it; megatron-core uses torch's instead")]


def apex_kind() -> str | None:
    """ "nvidia", "other" for the unrelated package of that name, or None. Nothing of either is executed."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return None
    places = [Path(place) for place in found.submodule_search_locations or []]
    own = ("multi_tensor_apply", "normalization", "contrib")
    return "nvidia" if any((place / name).is_dir() for place in places for name in own) else "other"


# ----------------------------------------------------------------------------------------------------------------- GPUs

PROBE = """
import json, torch
found = {"cuda_build": torch.version.cuda, "available": torch.cuda.is_available(), "torch": torch.__version__}
if torch.version.cuda:
    try:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:
        found["nccl_error"] = str(error)
if found["available"]:
    found["gpus"] = [
        [torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory]
        for i in range(torch.cuda.device_count())
    ]
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    found["product"] = bool((x @ x).isfinite().all())
print("FOUND", json.dumps(found))
"""
FP8_PROBE = """
import json, torch
import transformer_engine, transformer_engine.pytorch as te
from transformer_engine.common.recipe import DelayedScaling
found = {"version": transformer_engine.__version__}
try:
    layer = te.Linear(256, 256, params_dtype=torch.bfloat16).cuda()
    with te.fp8_autocast(enabled=True, fp8_recipe=DelayedScaling()):
        out = layer(torch.randn(64, 256, device="cuda", dtype=torch.bfloat16))
    out.float().sum().backward()
    found["fp8"] = bool(out.isfinite().all())
except Exception as error:
    found["fp8_error"] = f"{type(error).__name__}: {error}".splitlines()[0]
print("FOUND", json.dumps(found))
"""


def probe(code: str) -> dict:
    """What a piece of code finds out, in a process of its own. Raises RuntimeError with its last words."""
    import json

    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer within {PROBE_SECONDS} s") from None
    for line in done.stdout.splitlines():
        if line.startswith("FOUND "):
            return json.loads(line.removeprefix("FOUND "))
    last = [line for line in done.stderr.splitlines() if line.strip()]
    raise RuntimeError(last[-1] if last else f"exit code {done.returncode}")


def driver() -> str | None:
    """The version of NVIDIA's driver, None where nvidia-smi is not there. Raises RuntimeError where it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        raise RuntimeError("nvidia-smi does not answer") from None
    if done.returncode:
        raise RuntimeError(f"nvidia-smi: {(done.stderr or done.stdout).strip().splitlines()[0]}")
    return done.stdout.split()[0]


def _gpu() -> list[Finding]:
    try:
        version = driver()
    except RuntimeError as error:
        return [Finding("GPU driver", BROKEN, str(error), "this node cannot train; drain it")]
    try:
        found = probe(PROBE)
    except RuntimeError as error:
        return [Finding("torch", BROKEN, str(error), "torch cannot be used on this machine")]
    if not found["available"]:
        built = f"torch {found['torch']}, built for {'CUDA ' + found['cuda_build'] if found['cuda_build'] else 'CPUs'}"
        if version is None:
            return [Finding("GPU", MISSING, f"no driver; {built}", "training is on the CPU: toy models only")]
        return [Finding("GPU", BROKEN, f"driver {version}, but {built}", "install a torch that fits the driver")]
    rows = [Finding("GPU driver", OK, f"{version}, CUDA {found['cuda_build']}")]
    for number, (name, memory) in enumerate(found["gpus"]):
        rows.append(Finding(f"GPU {number}", OK, f"{name}, {memory / GIB:.0f} GiB"))
    if not found["product"]:
        rows.append(Finding("GPU 0", BROKEN, "a product of matrices is not finite", "drain this node"))
    nccl = found.get("nccl")
    costs = "" if nccl else "several GPUs cannot train together"
    rows.append(Finding("NCCL", OK if nccl else BROKEN, nccl or found.get("nccl_error", "not there"), costs))
    return rows


def _transformer_engine() -> list[Finding]:
    if importlib.util.find_spec("transformer_engine") is None:
        costs = "no train.linears: transformer_engine, no FP8, no routing: megatron_topk; pip install 'ecdit[te]'"
        return [Finding("Transformer Engine", MISSING, "not installed", costs)]
    try:
        found = probe(FP8_PROBE)
    except RuntimeError as error:
        return [Finding("Transformer Engine", BROKEN, str(error), "it does not fit torch or this machine")]
    fp8 = found.get("fp8")
    return [
        Finding("Transformer Engine", OK, found["version"]),
        Finding(
            "FP8",
            OK if fp8 else MISSING,
            "a layer runs forward and backward" if fp8 else found.get("fp8_error", "its result is not finite"),
            "" if fp8 else "no FP8; bf16 works",
        ),
    ]


# -------------------------------------------------------------------------------------------------- cluster and machine


def _slurm() -> list[Finding]:
    lacking = [name for name in ("sbatch", "srun", "squeue", "scontrol") if shutil.which(name) is None]
    if lacking:
        costs = "no ecdit launch and scale on this machine; torchrun and `scale --local` work"
        return [Finding("SLURM", MISSING, f"no {', '.join(lacking)}", costs)]
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%P %D %G"], capture_output=True, text=True, timeout=10)
        error = done.stderr.strip()
    except subprocess.TimeoutExpired:
        done, error = None, "sinfo does not answer within 10 s"
    if done is None or done.returncode:
        return [Finding("SLURM", WARNING, error.splitlines()[-1], "jobs cannot be submitted from here")]
    rows = [Finding("SLURM", OK, "; ".join(done.stdout.split("\n")).strip("; "))]
    if "SLURM_JOB_ID" in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE", "SLURMD_NODENAME")
        rows.append(Finding("SLURM job", OK, ", ".join(f"{n[6:]} {os.environ[n]}" for n in names if n in os.environ)))
    pyxis = subprocess.run(["srun", "--help"], capture_output=True, text=True, timeout=10).stdout
    there = "--container-image" in pyxis
    costs = "" if there else "cluster.container does not work; cluster.setup with a venv does"
    return [*rows, Finding("pyxis", OK if there else MISSING, "" if there else "srun has no --container-image", costs)]


def _infiniband(root: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    ports = sorted(root.glob("*/ports/*"))
    if not ports:
        return [Finding("InfiniBand", MISSING, "no adapter", "nodes talk over TCP, some ten times slower")]
    rates = []
    down = []
    for port in ports:
        state = (port / "state").read_text(encoding="utf-8").strip()
        name = f"{port.parent.parent.name}/{port.name}"
        if "ACTIVE" in state:
            rates.append((port / "rate").read_text(encoding="utf-8").strip())
        else:
            down.append(f"{name} {state}")
    found = ", ".join(f"{rates.count(rate)} x {rate}" for rate in sorted(set(rates)))
    if down:
        return [Finding("InfiniBand", WARNING, f"{found}; down: {', '.join(down)}", "less bandwidth between nodes")]
    return [Finding("InfiniBand", OK, found)]


def _shared_memory(place: Path = Path("/dev/shm")) -> list[Finding]:
    if not place.exists():
        return [Finding("shared memory", MISSING, f"no {place}", "data.workers must be 0")]
    size, free = shutil.disk_usage(place)[::2]
    low = free < LEAST_SHARED
    costs = f"readers with data.workers over 0, and NCCL, may fail; give {place} some GiB" if low else ""
    found = f"{free / GIB:.1f} of {size / GIB:.1f} GiB are free"
    return [Finding("shared memory", WARNING if low else OK, found, costs)]


def _limits() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < LEAST_FILES
    fix = f"jobs of many ranks run out of sockets; ulimit -n {_shown(hard)}" if low else ""
    rows = [Finding("open files", WARNING if low else OK, f"{_shown(soft)}, at most {_shown(hard)}", fix)]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    low = locked != resource.RLIM_INFINITY and any(Path("/sys/class/infiniband").glob("*"))
    fix = "InfiniBand needs to lock memory; ask for ulimit -l unlimited" if low else ""
    return [*rows, Finding("locked memory", WARNING if low else OK, _shown(locked, MIB), fix)]


def _shown(limit: int, unit: int = 1) -> str:
    suffix = " MiB" if unit > 1 else ""
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // unit}{suffix}"


def _disk() -> list[Finding]:
    free = shutil.disk_usage(".").free
    with NamedTemporaryFile(dir=".", prefix=".doctor-") as file:
        block, began = os.urandom(MIB), time.perf_counter()
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        rate = 64 * MIB / (time.perf_counter() - began)
    slow = rate < LEAST_WRITE
    costs = "checkpoints take long: 16 bytes a weight" if slow else ""
    found = f"{free / GIB:.0f} GiB free, {rate / 1e6:.0f} MB/s"
    return [Finding("disk here", WARNING if slow else OK, found, costs)]


def _host() -> list[Finding]:
    with open("/proc/meminfo", encoding="utf-8") as file:
        memory = int(re.search(r"MemAvailable:\s+(\d+)", file.read())[1]) * 1024
    found = f"{len(os.sched_getaffinity(0))} cores, {memory / GIB:.0f} GiB of memory available"
    return [Finding("host", OK, found)]


CHECKS = [
    _python, _needed, _gpu, _transformer_engine, _apex, _optional, _slurm, _infiniband, _shared_memory, _limits, _disk,
    _host,
]  # fmt: skip
