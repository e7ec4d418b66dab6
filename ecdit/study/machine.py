"""On what a study was run, in words."""

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """The GPUs, or else the CPU and how many cores of it, and torch's version."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        device = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    else:
        device = f"{len(os.sched_getaffinity(0))} cores of {_cpu()}"
    return f"{device}, torch {torch.__version__}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
