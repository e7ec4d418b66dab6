"""What may hang, crash or talk too much when it is tried: run by `ask.probe` in a process of its own.

`main(GROUP)` says `BEGIN name` and `FOUND name {...}` for every probe of the group.
"""

import importlib
import json
import os
import shutil
import sys
import time
import warnings
from tempfile import TemporaryFile

WRITTEN, WRITE_SECONDS = 64 << 20, 10


def cuda() -> dict:
    """What torch sees of the GPUs."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    why = str(caught[-1].message).splitlines()[0] if caught else ""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else []
    return {"available": available, "why": why, "names": names}


def product() -> dict:
    """Devices on which a product of matrices is not finite, or not the same twice."""
    import torch

    bad = []
    for index in range(torch.cuda.device_count()):
        x = torch.randn(2048, 2048, device=f"cuda:{index}", dtype=torch.bfloat16)
        once, again = x @ x, x @ x
        if not once.isfinite().all() or not torch.equal(once, again):
            bad.append(index)
    return {"bad": bad, "tried": torch.cuda.device_count()}


def nccl() -> dict:
    """Its version."""
    import torch

    return {"version": ".".join(map(str, torch.cuda.nccl.version()))}


def fp8() -> dict:
    """A linear layer of Transformer Engine, forward and backward in FP8."""
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import DelayedScaling

    available, why = te.is_fp8_available(return_reason=True)
    if not available:
        return {"works": False, "why": why}
    layer = te.Linear(256, 256, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with te.fp8_autocast(enabled=True, fp8_recipe=DelayedScaling()):
        out = layer(x)
    out.float().sum().backward()
    finite = all(t.isfinite().all().item() for t in (out, x.grad, layer.weight.grad))
    return {"works": finite, "why": "" if finite else "its result is not finite"}


def disk() -> dict:
    """Bytes that are free in the current folder, and bytes/s of a write to it. The file has no name, so none stays."""
    place = os.statvfs(".")
    free, block, size = place.f_bavail * place.f_frsize, os.urandom(1 << 20), 0
    with TemporaryFile(dir=".", buffering=0) as file:
        began = time.perf_counter()
        while size < min(WRITTEN, free // 2) and time.perf_counter() - began < WRITE_SECONDS:
            size += file.write(block)
        os.fsync(file.fileno())
    return {"free": free, "rate": size / (time.perf_counter() - began)}


def torch_build() -> dict:
    """Its build."""
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda}


def adam() -> dict:
    """Whether DeepSpeed's Adam for the host's memory can be built, or why not. Nothing is built."""
    from parallel.engine.deepspeed_import import import_deepspeed

    import_deepspeed()
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import is_ninja_available

    needed = {"ninja": is_ninja_available(), "a C++ compiler": shutil.which("g++") is not None}
    lacks = " and ".join(name for name, here in needed.items() if not here)
    works = not lacks and CPUAdamBuilder().is_compatible(verbose=False)
    return {"works": works, "why": f"{lacks} missing" if lacks else "" if works else "not for this processor"}


def async_io() -> dict:
    """Whether DeepSpeed's reading and writing of a disk can be built."""
    from parallel.engine.deepspeed_import import has_async_io

    works = has_async_io()
    return {"works": works, "why": "" if works else "libaio's headers are missing (Debian: libaio-dev)"}


def imports(name: str) -> dict:
    """Imports a module."""
    importlib.import_module(name)
    return {}


IMPORTS = {  # as ecdit imports them
    "megatron-core": "parallel.topology",
    "torchvision": "torchvision.transforms",
    "mosaicml-streaming": "ecdit.data.streaming_import",
}
GROUPS = {
    "imports": {"torch": torch_build}
    | {name: (lambda module=module: imports(module)) for name, module in IMPORTS.items()},
    "gpu": {"cuda": cuda, "product": product, "nccl": nccl},
    "fp8": {"transformer-engine": lambda: imports("transformer_engine.pytorch"), "FP8": fp8},
    "disk": {"disk": disk},
    "deepspeed": {"adam": adam, "async-io": async_io},
}


def main(group: str) -> None:
    """Every probe of a group, in order."""
    say = sys.stdout
    sys.stdout = sys.stderr  # libraries print as they are imported
    for name, attempt in GROUPS[group].items():
        print("BEGIN", name, file=say, flush=True)
        try:
            found = attempt()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            found = {"error": f"{type(error).__name__}: {first}".strip(": ")}
        print("FOUND", name, json.dumps(found), file=say, flush=True)
