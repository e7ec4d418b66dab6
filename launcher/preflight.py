"""Looks at every node of a job before the first step: disk, shards, GPUs, and a small all-reduce across the nodes.

The supervisor starts one task a node; each prints what is wrong with its node as a line of JSON. A node that prints
nothing in time is bad as well.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from launcher import slurm
from parallel.job import adopt_slurm

KIND = "preflight"
SECONDS = 300  # for all of it; importing torch from a network file system takes most
MEETING_SECONDS = 120
WRITTEN = 16 << 20
LEAST_FREE = 256 << 20
LEAST_RATE = 1e6  # bytes/s that a checkpoint can still be written with
REDUCED = 1 << 18  # numbers


# ------------------------------------------------------------------------------------------- on the first node of a job


def run(recipe: Recipe, arguments: list[str], nodes: list[str], environment: dict[str, str]) -> dict[str, str]:
    """What is wrong with nodes, by name; empty: all are well. arguments: the recipe's path and overrides, as typed."""
    command = [*slurm.srun(recipe.cluster, os.getcwd(), tasks=1), "ecdit", "preflight", *arguments]
    command[1:1] = [f"--nodes={len(nodes)}"]
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return verdicts(output, nodes)


def verdicts(output: str, nodes: list[str]) -> dict[str, str]:
    """Problems by node from the tasks' lines."""
    told = {}
    for line in output.splitlines():
        try:
            report = json.loads(line)
            told[report["node"]] = report["problems"]
        except (ValueError, KeyError, TypeError):
            continue  # something else that a library prints
    problems = {node: told.get(node, [f"no answer within {SECONDS} s"]) for node in nodes}
    return {node: "; ".join(found) for node, found in problems.items() if found}


# ------------------------------------------------------------------------------------------------------ on every node


def check(recipe: Recipe, runs: Path) -> list[str]:
    """What is wrong with this node, alone and together with the others."""
    problems = [
        problem
        for look in (lambda: _disk(runs / recipe.run), lambda: _shards(recipe), _gpus)
        for problem in _attempt(look)
    ]
    return problems + _attempt(lambda: _together(not problems))


def report(problems: list[str]) -> str:
    """The line that a task prints."""
    return json.dumps({"node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "problems": problems})


def _attempt(look: Callable[[], list[str]]) -> list[str]:
    try:
        return look()
    except Exception as error:  # whatever it is, this node has it
        return [f"{type(error).__name__}: {error}"]


def _disk(run: Path) -> list[str]:
    run.mkdir(parents=True, exist_ok=True)
    place = os.statvfs(run)
    free = place.f_bavail * place.f_frsize
    if free < LEAST_FREE:
        return [f"{run}: {free >> 20} MiB are free, less than {LEAST_FREE >> 20}"]
    file, began = run / f".preflight-{socket.gethostname()}", time.perf_counter()
    try:
        with file.open("wb") as out:
            out.write(os.urandom(WRITTEN))
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        return [f"{run}: cannot be written: {error.strerror}"]
    finally:
        file.unlink(missing_ok=True)
    rate = WRITTEN / (time.perf_counter() - began)
    return [f"{run}: is written at {rate / 1e6:.1f} MB/s"] if rate < LEAST_RATE else []


def _shards(recipe: Recipe) -> list[str]:
    from ecdit.data.inputs import open_stream

    try:
        open_stream(recipe, 0, 1)
    except UserError as error:
        return [str(error)]
    return []


def _gpus() -> list[str]:
    import torch

    problems = []
    for index in range(torch.cuda.device_count()):
        x = torch.randn(2048, 2048, device=f"cuda:{index}", dtype=torch.bfloat16)
        once, again = x @ x, x @ x
        if not once.isfinite().all() or not torch.equal(once, again):
            problems.append(f"GPU {index} computes the same product twice and gets two results")
    return problems


def _together(well: bool) -> list[str]:
    """Meets the other nodes, compares the GPUs that they see, and reduces a tensor over all of them."""
    import torch
    import torch.distributed as dist

    adopt_slurm()
    if "RANK" not in os.environ:
        return []  # a job of one node
    rank, nodes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = timedelta(seconds=MEETING_SECONDS)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), nodes, rank == 0, patience, wait_for_workers=False
    )
    gpus = torch.cuda.device_count()
    store.set(f"gpus/{rank}", str(gpus))
    store.set(f"well/{rank}", str(int(well)))
    store.wait([f"{word}/{other}" for word in ("gpus", "well") for other in range(nodes)], patience)
    most = max(int(store.get(f"gpus/{other}")) for other in range(nodes))
    if gpus < most:
        return [f"{gpus} GPUs are seen, {most} on other nodes"]
    problems = []
    if all(int(store.get(f"well/{other}")) for other in range(nodes)):
        backend = "nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("check", store), rank=rank, world_size=nodes)
        device = torch.device("cuda", 0) if gpus else torch.device("cpu")
        ones = torch.ones(REDUCED, device=device)
        dist.all_reduce(ones)
        if not torch.equal(ones, torch.full_like(ones, nodes)):
            problems.append(f"an all-reduce over {nodes} nodes gave {ones.unique().tolist()[:4]}")
        dist.destroy_process_group()
    _leave_last(store, rank, nodes, patience)
    return problems


def _leave_last(store, rank: int, nodes: int, patience: timedelta) -> None:
    """The first rank has the store, so it waits for the others."""
    store.set(f"done/{rank}", "")
    if rank == 0:
        store.wait([f"done/{other}" for other in range(nodes)], patience)
        time.sleep(0.2)
