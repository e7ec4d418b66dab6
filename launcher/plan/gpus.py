"""What a GPU and its links can do, and which part of that training reaches."""

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ecdit.errors import UserError
from ecdit.recipe import ClusterRecipe

GB = 1e9
# which numbers are valid; all others are divided by, and over 0
WHOLE = {"gpus_per_node"}
MAY_BE_ZERO = {"fp8", "kernel_seconds", "host_seconds", "link_latency", "context", "slack"}
SHARES = {"product_share", "fp8_share", "hbm_share", "link_share"}


@dataclass(frozen=True)
class Gpu:
    """Rates of one GPU (bytes/s and FLOP/s, one direction of a link) and the shares of them that are reached.

    kernel_seconds: a kernel's least time. host_seconds: what the host needs to launch one, autograd included.
    """

    name: str
    memory: float  # bytes
    bf16: float  # FLOP/s, dense
    fp32: float  # FLOP/s of fp32 products
    hbm: float
    nvlink: float
    network: float
    gpus_per_node: int = 8
    fp8: float = 0.0  # FLOP/s, dense; 0: as bf16
    # measured on an H200 and on H100s; docs/benchmarks.md
    product_share: float = 0.70
    fp8_share: float = 0.55  # with the casts to it
    hbm_share: float = 0.75
    link_share: float = 0.80
    kernel_seconds: float = 2.5e-6
    host_seconds: float = 21.5e-6
    link_latency: float = 15e-6
    pcie: float = 20e9  # to and from pinned memory of the host
    host: float = 50e9  # the host's memory, as far as the update of one rank's offloaded weights uses it
    disk: float = 3e9  # of what is offloaded to one, both ways together
    context: float = 1.2 * GB  # CUDA context, cuBLAS workspaces, NCCL's buffers
    slack: float = 0.06  # of what is allocated: what the allocator holds on to besides


# Datasheets of NVIDIA: dense rates, memory, NVLink of one direction; the network as in their DGX systems.
GPUS = {
    "a100": Gpu("a100", 80 * GB, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
    "h100": Gpu("h100", 80 * GB, 989e12, 67e12, 3.35e12, 450e9, 50e9, fp8=1979e12),
    "h200": Gpu("h200", 141 * GB, 989e12, 67e12, 4.8e12, 450e9, 50e9, fp8=1979e12),
    "b200": Gpu("b200", 180 * GB, 2250e12, 80e12, 7.7e12, 900e9, 50e9, fp8=4500e12),
    # without NVLink: through PCIe
    "rtx4090": Gpu("rtx4090", 24 * GB, 165e12, 83e12, 1.01e12, 25e9, 12.5e9, fp8=330e12),
}


def load(name: str) -> Gpu:
    """A GPU of the table, or of a YAML file with the fields of `Gpu`; `like: h100` fills what it leaves out.

    Raises UserError naming the file, the key and what would be valid.
    """
    if name in GPUS:
        return GPUS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"cluster.gpu: {name!r} is not known; valid: {', '.join(GPUS)}, or a YAML file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, or no date
        raise UserError(f"{path}: cannot read this GPU: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a GPU is a mapping of keys to values")
    return _parse(path, values)


def of_cluster(cluster: ClusterRecipe) -> Gpu | None:
    """The GPU of a recipe's cluster; None where it has none. Raises UserError where it is not known."""
    return replace(load(cluster.gpu), gpus_per_node=cluster.tasks) if cluster.gpus_per_node else None


def _parse(path: Path, values: dict) -> Gpu:
    known = {field.name: field for field in fields(Gpu)}
    like = values.pop("like", None)
    if like is not None and not (isinstance(like, str) and like in GPUS):
        raise UserError(f"{path}: like: {like!r} is not known; valid: {', '.join(GPUS)}")
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path}: {key}: unknown key; valid: {', '.join(known)}")
        values[key] = _parse_name(path, value) if key == "name" else _parse_number(path, key, value)
    if like is not None:
        return replace(GPUS[like], name=values.pop("name", path.stem), **values)
    needed = [field.name for field in fields(Gpu)[1:7] if field.name not in values]
    if needed:
        raise UserError(f"{path}: missing {', '.join(needed)}; or say like: {', '.join(GPUS)}")
    return Gpu(**({"name": path.stem} | values))


def _parse_name(path: Path, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{path}: name: {value!r} is no text")
    return value


def _parse_number(path: Path, key: str, value: Any) -> float | int:
    try:
        number = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{path}: {key}: {value!r} is no number; valid: {_valid(key)}")
    most = 1 if key in SHARES else math.inf
    if not 0 <= number <= most or (number == 0 and key not in MAY_BE_ZERO) or (key in WHOLE and number % 1):
        raise UserError(f"{path}: {key}: {value!r} is out of range; valid: {_valid(key)}")
    return int(number) if key in WHOLE else number


def _valid(key: str) -> str:
    if key in WHOLE:
        return "1, 2, 3, ..."
    least = "0 or more" if key in MAY_BE_ZERO else "a finite number over 0"
    return f"{least}, at most 1" if key in SHARES else least
