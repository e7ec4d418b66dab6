"""Runs a function on several ranks over gloo, each a process of its own."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from itertools import count
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.multiprocessing as mp

_ports = count(os.getpid())


def run_on_ranks(function: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Calls function(*args) on `world` ranks and returns what each returned. An error on one is raised here."""
    queue = _server().SimpleQueue()
    processes = start_ranks(function, world, free_port(), queue, args)
    try:
        answers = _answers(queue, processes)
    except AssertionError:
        for process in processes:  # which may wait for the one that failed
            process.kill()
        raise
    for process in processes:
        process.join(60)
    return [answers[rank] for rank in range(world)]


def start_ranks(function: Callable[..., Any], world: int, port: int, queue: Any, args: tuple) -> list[mp.Process]:
    """Processes that call the function and put what it returned into the queue."""
    context = _server()
    variables = {name: value for name, value in os.environ.items() if name.startswith("ECDIT_")}
    processes = [
        context.Process(target=_rank, args=(function, rank, world, port, variables, args, queue))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def forked(function: Callable[..., None], *args: Any) -> mp.Process:
    """A process that has begun to call the function."""
    process = _server().Process(target=function, args=args)
    process.start()
    return process


def _server() -> Any:
    """Of processes that have imported torch, megatron-core and the rest already: once, not once a process."""
    if torch.cuda.is_available():  # what has touched a GPU cannot be forked, and Transformer Engine does when imported
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["ecdit.train", "ecdit.evaluate.suites", "ecdit.cli"])
    return context


def free_port() -> int:
    """A port that nobody listens on. Below those that connections are given, any of which may be taken before it is
    used, and another one each time, of this test worker's own."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 12_000 + 2000 * (number % 10) + next(_ports) % 2000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def _answers(queue: Any, processes: list[mp.Process]) -> dict[int, Any]:
    """Every rank's, by its number."""
    answers: dict[int, Any] = {}
    while len(answers) < len(processes):
        waiting = {process.sentinel: rank for rank, process in enumerate(processes) if rank not in answers}
        ready = wait([queue._reader, *waiting])
        if queue._reader not in ready:
            rank = waiting[ready[0]]
            raise AssertionError(f"rank {rank} ended with exit code {processes[rank].exitcode} and said nothing")
        rank, answer, error = queue.get()
        if error is not None:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        answers[rank] = pickle.loads(answer)
    return answers


def _rank(
    function: Callable[..., Any], rank: int, world: int, port: int, variables: dict, args: tuple, queue: Any
) -> None:
    os.environ |= variables | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        # pickled whole: torch's own queues share memory that goes when its process does
        queue.put((rank, pickle.dumps(function(*args)), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
