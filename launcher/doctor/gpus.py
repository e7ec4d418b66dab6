"""The GPUs: their driver, their health, whether torch and NCCL fit them, and whether FP8 works on them."""

import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from launcher.doctor.ask import NoAnswer, ask, last_line, probe
from launcher.doctor.finding import BROKEN, MISSING, OK, WARNING, Finding
from launcher.doctor.packages import TRANSFORMER_ENGINE, judge, version_of

SMI_SECONDS = 20
DRIVER, GPUS, PRODUCT, NCCL, COPIES, FP8 = "GPU driver", "GPUs", "GPU product", "NCCL", "copy engines", "FP8"
FIELDS = (
    "driver_version", "name", "memory.total", "memory.used", "mig.mode.current",
    "ecc.errors.uncorrected.volatile.total", "retired_pages.pending",
)  # fmt: skip
FEW_FIELDS = FIELDS[:4]  # what every driver knows
NVIDIA, DISPLAY = "0x10de", "0x03"
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
BUSY_MIB = 1024
NO_GPU = "there is no GPU to try it on"


@dataclass(frozen=True)
class Card:
    """A line of nvidia-smi; memory in MiB, None where it is not told."""

    driver: str
    name: str
    total: int | None
    used: int | None
    mig: bool = False
    errors: int = 0
    pending: bool = False


def cards(output: str) -> list[Card]:
    """From what nvidia-smi prints for FIELDS or FEW_FIELDS as CSV without head and units."""
    found = []
    for line in output.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) not in (len(FIELDS), len(FEW_FIELDS)):
            continue  # a warning of its own
        driver, name, total, used, mig, errors, pending = (*parts, *[""] * (len(FIELDS) - len(parts)))
        found.append(
            Card(driver, name, _number(total), _number(used), mig == "Enabled", _number(errors) or 0, pending == "Yes")
        )
    return found


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None  # [N/A], [Not Supported], [Unknown Error]


def query() -> list[Card]:
    """What nvidia-smi tells. Raises NoAnswer where it does not work."""
    for fields in (FIELDS, FEW_FIELDS):
        command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        code, output, errors = ask(command, SMI_SECONDS)
        if code == 0 and cards(output):
            return cards(output)
        if "not a valid field" not in output + errors:
            break
    raise NoAnswer(last_line(errors) or last_line(output) or f"exit code {code}")


def on_the_bus(root: Path = Path("/sys/bus/pci/devices")) -> int:
    """NVIDIA's GPUs that the PCI bus has, with a driver or without."""

    def read(device: Path, name: str) -> str:
        try:
            return (device / name).read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    return sum(read(one, "vendor") == NVIDIA and read(one, "class").startswith(DISPLAY) for one in root.glob("*"))


@cache
def look() -> tuple[list[Card], str]:
    """The cards, and why there are none where nvidia-smi is there and fails. Asked once, for it may hang."""
    if not shutil.which("nvidia-smi"):
        return [], ""
    try:
        return query(), ""
    except NoAnswer as error:
        return [], str(error)


def gpus(bus: Path = Path("/sys/bus/pci/devices")) -> list[Finding]:
    """Driver, GPUs, a product of matrices on each, NCCL."""
    there = on_the_bus(bus)
    found, why = look()
    if why:
        return [_silent_driver(why, there), *_untried("the driver does not work")]
    build = probe("imports")["torch"]
    tried = probe("gpu") if found or build.get("cuda") else {}
    if not found:  # a container may have the driver without nvidia-smi
        found = [Card("of unknown version", name, None, None) for name in tried.get("cuda", {}).get("names", [])]
    if found:
        return judge_cards(found, build, tried)
    if there:
        costs = "training is on the CPU; install NVIDIA's driver, or give the container its GPUs"
        return [Finding(DRIVER, WARNING, f"none, but {there} of NVIDIA's GPUs on the bus", costs), *_untried(NO_GPU)]
    costs = "training is on the CPU: toy models only (a login node needs no GPU)"
    return [Finding(DRIVER, MISSING, "no nvidia-smi", costs), *_untried(NO_GPU)]


def _silent_driver(why: str, there: int) -> Finding:
    hangs = why.startswith("no answer")
    if hangs or there or "SLURM_JOB_GPUS" in os.environ:
        return Finding(DRIVER, BROKEN, f"nvidia-smi: {why}", "this node cannot train; drain it, see dmesg for Xid")
    return Finding(DRIVER, MISSING, f"nvidia-smi: {why}", "no GPU is here, as on a login node; training is on the CPU")


def _untried(why: str) -> list[Finding]:
    return [
        Finding(GPUS, MISSING, "none that can be used", "training is on the CPU: toy models only"),
        Finding(PRODUCT, MISSING, "not tried", why),
        Finding(NCCL, MISSING, "not tried", why),
    ]


def judge_cards(found: list[Card], build: dict, tried: dict[str, dict]) -> list[Finding]:
    """found: of nvidia-smi; build: of torch; tried: what the probes of the group `gpu` said."""
    driver = found[0].driver
    seen = tried.get("cuda", {})
    if not seen.get("available"):
        return [Finding(DRIVER, OK, driver), _unusable(found, build, seen), *_untried("torch cannot use the GPUs")[1:]]
    rows = [Finding(DRIVER, OK, f"{driver}, torch for CUDA {build.get('cuda')}"), _health(found, seen["names"])]
    product, nccl = tried.get("product", {}), tried.get("nccl", {})
    if product.get("bad") == []:
        rows.append(Finding(PRODUCT, OK, f"finite, and the same twice, on {product['tried']}"))
    else:
        bad = product.get("error") or f"wrong on {', '.join(map(str, product.get('bad', ['all'])))}"
        rows.append(Finding(PRODUCT, BROKEN, bad, "this node cannot train; drain it"))
    if "version" in nccl:
        rows.append(Finding(NCCL, OK, nccl["version"]))
    else:
        rows.append(Finding(NCCL, WARNING, nccl.get("error", "not tried"), "several GPUs cannot train together"))
    return rows + (_copies() if len(seen["names"]) > 1 else [])


def _copies() -> list[Finding]:
    """Whether a stream can wait for a word of memory, for which torch has no function."""
    version = version_of("cuda-bindings")
    if version is not None:
        return [Finding(COPIES, OK, f"by cuda-bindings {version}")]
    costs = "tokens go to experts on the same node by NCCL, which slows products down; pip install cuda-bindings"
    return [Finding(COPIES, MISSING, "cuda-bindings is not installed", costs)]


def _unusable(found: list[Card], build: dict, seen: dict) -> Finding:
    driver, hidden = found[0].driver, os.environ.get("CUDA_VISIBLE_DEVICES")
    there = f"{len(found)} x {found[0].name}"
    if not build.get("cuda"):
        return Finding(GPUS, BROKEN, f"{there}, but torch is built for CPUs", "install a build of torch for CUDA")
    least = LEAST_DRIVER.get(int(build["cuda"].split(".")[0]), 0)
    if (_number(driver.split(".")[0]) or least) < least:
        what = f"{there}, but driver {driver} is too old for torch's CUDA {build['cuda']}"
        return Finding(GPUS, BROKEN, what, f"update the driver to {least} or newer, or install torch for an older CUDA")
    if hidden in ("", "-1"):
        what = f"{there}, hidden by CUDA_VISIBLE_DEVICES={hidden}"
        return Finding(GPUS, MISSING, what, "training is on the CPU; unset it")
    why = seen.get("error") or seen.get("why") or "it does not say why"
    return Finding(GPUS, BROKEN, f"{there}, but torch cannot use them: {why}", "this node cannot train")


def _health(found: list[Card], names: list[str]) -> Finding:
    worries = []
    for index, card in enumerate(found):
        if card.errors:
            worries.append(f"GPU {index} has {card.errors} uncorrected memory errors: drain the node")
        if card.pending:
            worries.append(f"GPU {index} waits for a reset to retire bad memory: drain the node")
        if card.mig:
            worries.append(f"GPU {index} is split by MIG: NCCL does not join the parts")
        if (card.used or 0) > BUSY_MIB:
            worries.append(f"GPU {index} has {card.used} MiB in use: another program is on it")
    memory = f", {found[0].total / 1024:.0f} GiB each" if found[0].total else ""
    what = f"{' + '.join(f'{names.count(name)} x {name}' for name in dict.fromkeys(names))}{memory}"
    if len(names) < len(found):
        what += f" (of {len(found)} here)"
    return Finding(GPUS, WARNING if worries else OK, what, "; ".join(worries))


def transformer_engine() -> list[Finding]:
    """Whether it can be imported, and whether a layer runs in FP8."""
    version = version_of(TRANSFORMER_ENGINE.name)
    if version is None:
        return [judge(TRANSFORMER_ENGINE, None), Finding(FP8, MISSING, "no Transformer Engine", "no FP8; bf16 works")]
    if look()[1]:  # importing it may touch the driver
        return judge_engine(version, {}, False)
    works = probe("gpu").get("cuda", {}).get("available", False)
    return judge_engine(version, probe("fp8"), works)


def judge_engine(version: str, tried: dict[str, dict], gpus_work: bool) -> list[Finding]:
    """tried: what the probes of the group `fp8` said."""
    row = judge(TRANSFORMER_ENGINE, version, tried.get("transformer-engine", {}).get("error"))
    fp8, costs = tried.get("FP8", {}), "no FP8; bf16 works"
    if not gpus_work:
        return [row, Finding(FP8, MISSING, NO_GPU, costs)]
    if fp8.get("works"):
        return [row, Finding(FP8, OK, "a layer of Transformer Engine ran forward and backward")]
    if "error" in fp8:
        return [row, Finding(FP8, WARNING, f"a layer of Transformer Engine failed: {fp8['error']}", costs)]
    return [row, Finding(FP8, MISSING, fp8.get("why") or "not tried", costs)]
