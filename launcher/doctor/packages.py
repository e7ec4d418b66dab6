"""Python, the packages that training needs, those that it can do without, and the two that are called apex."""

import importlib.metadata
import importlib.util
import platform
import re
import sys
from dataclasses import dataclass

from launcher.doctor.ask import probe
from launcher.doctor.finding import BROKEN, MISSING, OK, WARNING, Finding
from parallel.installed import apex_kind


@dataclass(frozen=True)
class Package:
    """One that setup.py names: its versions as there, its extra (none: it is needed), what its lack costs."""

    name: str
    versions: str
    extra: str = ""
    costs: str = "nothing can be trained"

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install 'ecdit[{self.extra}]'" if self.extra else "pip install ecdit"


NEEDED = (
    Package("torch", ">=2.11"),
    Package("megatron-core", ">=0.16.1,<0.17"),
    Package("mosaicml-streaming", ">=0.13,<0.14"),
)
TRANSFORMER_ENGINE = Package(
    "transformer-engine", ">=2.9,<2.12", "te", "no train.linears: transformer_engine, no model.routing: megatron_topk"
)
DEEPSPEEDS_DISK = "DeepSpeed's disk"
OPTIONAL = (
    Package("transformers", ">=4.50", "encoders", "no T5 text encoder; data.text_encoder: hash alone"),
    Package("diffusers", ">=0.35", "encoders", "no AutoencoderKL; data.autoencoder: pixels alone"),
    Package("deepspeed", ">=0.19.8,<0.20", "deepspeed", "no engine: deepspeed, so no offload to host memory or disk"),
    Package("wandb", ">=0.18", "wandb", "no log.wandb; metrics.jsonl and TensorBoard are written without it"),
    Package("requests", ">=2.32", "eval", "no server that answers for ecdit evaluate --suite dsg"),
)


def version_of(package: str) -> str | None:
    """The installed version of a package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def within(version: str, versions: str) -> bool:
    """Whether a version is in a range such as ">=0.16.1,<0.17", by its numbers: 2.11.0a0 of a container is 2.11.0."""
    here = _numbers(version)
    for bound in versions.split(","):
        least = bound.startswith(">=")
        other = _numbers(bound.lstrip("<>="))
        if (here < other) if least else (here >= other):
            return False
    return True


def _numbers(version: str) -> list[int]:
    numbers = [int(part) for part in re.match(r"\d+(\.\d+)*", version)[0].split(".")]
    return numbers + [0] * (4 - len(numbers))


def judge(package: Package, version: str | None, error: str | None = None) -> Finding:
    """version: None where it is not installed. error: why its import failed."""
    if version is None:
        absent = MISSING if package.extra else BROKEN
        return Finding(package.name, absent, "not installed", f"{package.costs}; {package.remedy}")
    if error:
        return Finding(package.name, BROKEN, f"{version} cannot be imported: {error}", package.costs)
    if not within(version, package.versions):
        return Finding(package.name, WARNING, version, f"ecdit is made for {package.versions}; {package.remedy}")
    return Finding(package.name, OK, version)


def python() -> list[Finding]:
    """Its version."""
    state = OK if sys.version_info >= (3, 11) else BROKEN
    return [Finding("Python", state, platform.python_version(), "" if state == OK else "3.11 or newer is needed")]


def needed() -> list[Finding]:
    """What every run imports, imported."""
    imports = probe("imports")
    rows = [judge(one, version_of(one.name), imports.get(one.name, {}).get("error")) for one in NEEDED]
    build = imports["torch"]
    if rows[0].state in (OK, WARNING) and "version" in build:
        built = f"CUDA {build['cuda']}" if build["cuda"] else "CPUs"
        rows[0] = Finding("torch", rows[0].state, f"{build['version']}, built for {built}", rows[0].costs)
    return rows


def torchvision() -> list[Finding]:
    """Whether it is of torch's build. Nothing here uses it."""
    version, error = version_of("torchvision"), probe("imports").get("torchvision", {}).get("error")
    if version is None:
        return [Finding("torchvision", MISSING, "not installed", "nothing: no part of ecdit uses it")]
    if error:
        costs = "nothing here, where it is hidden; programs that use it need one built for this torch"
        return [Finding("torchvision", WARNING, f"{version} does not fit torch: {error}", costs)]
    return [Finding("torchvision", OK, version)]


def triton() -> list[Finding]:
    """Which torch.compile needs on a GPU."""
    version = version_of("triton")
    if version is None:
        costs = "no torch.compile on a GPU; no part of ecdit needs it"
        return [Finding("triton", MISSING, "not installed", costs)]
    return [Finding("triton", OK, version)]


def optional() -> list[Finding]:
    """By their versions alone: they are slow to import."""
    return [judge(one, version_of(one.name)) for one in OPTIONAL]


def deepspeed() -> list[Finding]:
    """What it builds on this machine when it is first used."""
    builds = (
        ("DeepSpeed's Adam", "adam", "optimizer.name: adamw on offloaded weights takes torch's arithmetic"),
        (DEEPSPEEDS_DISK, "async-io", "no engine_options.offload_optimizer or offload_weights: nvme"),
    )
    if version_of("deepspeed") is None:
        return [Finding(name, MISSING, "DeepSpeed is not installed", costs) for name, _, costs in builds]
    found = probe("deepspeed")
    return [judge_build(name, found[asked], costs) for name, asked, costs in builds]


def judge_build(name: str, found: dict, costs: str) -> Finding:
    """found: whether it works, and why not."""
    if found.get("works"):
        return Finding(name, OK, "can be built here, at its first use")
    return Finding(name, MISSING, f"cannot be built: {found.get('error') or found['why']}", costs)


def apex() -> list[Finding]:
    """NVIDIA's, the unrelated package of that name, or none."""
    kind, version = apex_kind(), version_of("apex")
    if kind == "nvidia":
        if importlib.util.find_spec("amp_C") is None:
            costs = "built without --cuda_ext: libraries that look for it may fail; split linears do not sum gradients"
            return [Finding("apex", WARNING, f"NVIDIA's, {version or 'from source'}, without its kernels", costs)]
        return [Finding("apex", OK, f"NVIDIA's, {version or 'from source'}, with its kernels")]
    if kind == "other":
        found = f"not NVIDIA's but another package of that name, {version or 'of unknown version'}"
        return [Finding("apex", WARNING, found, "libraries may take it for NVIDIA's; pip uninstall apex")]
    costs = "linears split over tensor ranks do not add gradients up in their products; `pip install apex` is unrelated"
    return [Finding("apex", MISSING, "not installed", costs)]
