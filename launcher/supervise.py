"""What goes on after a training command has ended: done, start it again, or give up, and why.

It stands between a batch job, or a terminal, and the training command. It starts the command, passes on the signal
that comes ahead of a time limit, sees a command that is stuck, and reads `status.json` for how it ended. In a SLURM job
*again* means that the job requeues itself, elsewhere that the command is started anew here.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecdit.errors import UserError
from ecdit.recipe import ClusterRecipe, Recipe
from ecdit.status import (
    BAD_INPUT,
    CRASH,
    HANG,
    NOT_FINITE,
    OUT_OF_MEMORY,
    SUPERVISED,
    read_status,
    update_status,
)
from launcher import preflight, slurm
from launcher.plan.gpus import of_cluster
from launcher.plan.search import best_layout

DONE, FAILED, STOPPED = 0, 1, 75
LOST = "lost"  # the job ended without a word: its node went, or it was killed
UNDER_WAY = ("pending", "running", "requeued")
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
LAST_WORDS = 4000  # bytes of the command's output in which the cause of its end is looked for
MEMORY_WORDS = ("oom-kill", "oom_kill", "out of memory", "out-of-memory")
NODE_WORD = "node failure"  # srun's
SLURM_WORDS = ("srun:", "slurmstepd")
LONGEST_BACK_OFF = 1800
STUCK_TIMES, STUCK_SECONDS = 3, 600  # the ranks' own watch failed too: so many times its limit, and so long


@dataclass(frozen=True)
class Verdict:
    """What to do next: `state` as status.json has it; wait and nodes to leave out for "requeued"."""

    state: str
    kind: str = ""
    why: str = ""
    delay: int = 0


# -------------------------------------------------------------------------------------------------------------- judging


def judge(status: dict[str, Any], code: int, words: str, cluster: ClusterRecipe) -> tuple[Verdict, list[dict]]:
    """How a command ended that exited with `code` and said `words` last, and the crashes since the last progress.

    status: what the run's status.json says after it, with `checkpoint`, the newest one's step, added.
    """
    crashes = [c for c in status.get("crashes", []) if c["checkpoint"] == status["checkpoint"]]
    if status.get("state") == "finished":
        return Verdict("finished"), []
    if status.get("state") == "requeue":
        return Verdict("requeued", why=status.get("why", "")), crashes
    kind, why = _cause(status, code, words)
    if kind in (BAD_INPUT, NOT_FINITE):
        return Verdict("failed", kind, why), crashes
    crashes.append({"kind": kind, "why": why, "checkpoint": status["checkpoint"], "time": time.time()})
    if len(crashes) >= cluster.crashes:
        listed = "; ".join(f"{c['kind']}: {c['why']}" for c in crashes)
        why = f"{len(crashes)} crashes without a new checkpoint (cluster.crashes: {cluster.crashes}): {listed}"
        return Verdict("failed", kind, why), crashes
    delay = min(cluster.back_off_seconds * 2 ** (len(crashes) - 1), LONGEST_BACK_OFF)
    return Verdict("requeued", kind, why, delay), crashes


def _cause(status: dict[str, Any], code: int, words: str) -> tuple[str, str]:
    if NODE_WORD in words.lower():
        return LOST, "a node failed"
    killed_for_memory = any(word in words.lower() for word in MEMORY_WORDS)
    if status.get("failure"):
        kind, why = status["failure"]["kind"], status["failure"]["why"]
        # ranks whose peer the kernel killed tell of a broken connection
        return (OUT_OF_MEMORY if kind == CRASH and killed_for_memory else kind), why
    if code == 2:
        return BAD_INPUT, words.strip().splitlines()[-1] if words.strip() else "exit code 2"
    own = [line for line in words.splitlines() if line.strip() and not line.startswith(SLURM_WORDS)]
    last = own[-1] if own else ""
    return OUT_OF_MEMORY if killed_for_memory else CRASH, f"exit code {code}" + (f": {last.strip()}" if last else "")


# ------------------------------------------------------------------------------------------------------------- running


class Command:
    """The training command. Its output goes where this process's goes, and its last words are kept."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.words = b""
        self._process = subprocess.Popen(
            command, env=os.environ | environment, stderr=subprocess.PIPE, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._name = Path(command[0]).name

    def _read(self) -> None:
        while block := os.read(self._process.stderr.fileno(), 65536):
            os.write(2, block)
            self.words = (self.words + block)[-LAST_WORDS:]

    def ask_to_stop(self) -> None:
        """A checkpoint, then the end. srun passes the one signal on to the tasks, torchrun the other."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1 if self._name == "srun" else signal.SIGTERM)

    def kill(self) -> None:
        """It does not answer any more."""
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> int | None:
        """Its exit code, or None while it runs."""
        try:
            code = self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(timeout=10)
        return code


class Supervisor:
    """One run's. `command` gets the recipe's path, the overrides and the layout that fits the nodes."""

    def __init__(self, recipe: Recipe, arguments: list[str], command: list[str], runs: Path):
        """arguments: the recipe's path and overrides, as typed."""
        self.recipe, self.cluster, self.run = recipe, recipe.cluster, runs / recipe.run
        self._arguments = [*arguments, "--runs", str(runs)]
        self._command = [*command, *self._arguments]
        self.job = slurm.Job.here()
        self._stopped: str | None = None
        self._child: Command | None = None

    def supervise(self) -> int:
        """Until the run is done, given up or handed on to the job's next start. Returns the exit code."""
        self._refuse_a_second_one()
        for number in SIGNALS:
            signal.signal(number, self._catch)
        while True:
            verdict, exclude = self._attempt()
            if verdict.state == "requeued" and self._stopped is not None and self.job is None:
                verdict = Verdict("requeue", why=verdict.why)  # someone at a terminal, who will come back
            self._write(verdict)
            if verdict.state != "requeued":
                return {"finished": DONE, "requeue": STOPPED, "cancelled": STOPPED}.get(verdict.state, FAILED)
            if self.job is not None:
                return self._requeue(verdict, exclude)
            time.sleep(verdict.delay)

    def _attempt(self) -> tuple[Verdict, list[str]]:
        """One start of the command: how it ended, and nodes to leave out."""
        verdict = self._lost()
        if verdict is not None and verdict.state == "failed":
            return verdict, []
        job = self.job and self.job.number
        self._status(state="running", kind="", why="", failure=None, job=job, host=socket.gethostname())
        try:
            layout, nodes = self._layout()
        except UserError as error:
            return Verdict("failed", BAD_INPUT, str(error)), []
        environment = {SUPERVISED: "1"}
        if self.job is not None:
            environment |= {"MASTER_ADDR": _own_name(), "MASTER_PORT": str(_free_port())}
            if self.cluster.preflight and (bad := self._preflight(nodes, environment)):
                return self._bad_nodes(bad)
            environment |= slurm.limit(nodes, self.cluster.tasks)
        code, words = self._run([*self._command, *layout], environment)
        verdict, crashes = judge(self._read_status(), code, words, self.cluster)
        self._status(crashes=crashes)
        return verdict, []

    def _layout(self) -> tuple[list[str], int]:
        """Overrides of the layout for the nodes that are there, and how many of them it takes.

        Raises UserError where no number of nodes that the recipe allows has one.
        """
        if self.job is None:
            return [], 1
        there = len(self.job.nodes)
        gpu = of_cluster(self.cluster)
        fewest = min(there, self.cluster.min_nodes or self.cluster.nodes)
        for nodes in range(there, fewest - 1, -1):
            try:
                return best_layout(self.recipe, nodes, self.cluster.tasks, gpu), nodes
            except UserError as error:
                refused = error
                _say(f"{nodes} of {there} nodes: {error}")
        raise refused

    def _preflight(self, nodes: int, environment: dict[str, str]) -> dict[str, str]:
        return preflight.run(self.recipe, self._arguments, self.job.nodes[:nodes], environment)

    def _run(self, command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        self._child = child = Command(command, environment)
        if self._stopped is not None:  # while it was being started
            child.ask_to_stop()
        while (code := child.wait(seconds=1.0)) is None:
            if self._stuck():
                child.kill()
                self._status(failure={"kind": HANG, "why": "no step, and no rank that could say so"})
        return code, child.words.decode(errors="replace")

    def _stuck(self) -> bool:
        status = read_status(self.run)
        if status.get("state") != "running" or "hang_seconds" not in status:
            return False
        return time.time() - status["updated"] > STUCK_TIMES * status["hang_seconds"] + STUCK_SECONDS

    def _bad_nodes(self, bad: dict[str, str]) -> tuple[Verdict, list[str]]:
        """bad: what is wrong, by node."""
        why = "; ".join(f"{node}: {what}" for node, what in sorted(bad.items()))
        status = self._read_status() | {"failure": {"kind": preflight.KIND, "why": why}}
        if len(bad) == len(self.job.nodes) and len(set(bad.values())) == 1:  # not the nodes' fault
            return Verdict("failed", preflight.KIND, why), []
        verdict, crashes = judge(status, FAILED, "", self.cluster)
        excluded = sorted({*status.get("excluded", []), *bad})
        self._status(crashes=crashes, excluded=excluded)
        return verdict, excluded

    def _lost(self) -> Verdict | None:
        """What to make of an attempt of this job that left no word. None: there was none."""
        status = self._read_status()
        again = self.job is not None and self.job.restarts and status.get("job") == self.job.number
        if not again or status.get("state") != "running":
            return None
        words = f"the job ended without a word on {status.get('host')}: its node failed, or it was killed"
        verdict, crashes = judge(status | {"failure": {"kind": LOST, "why": words}}, FAILED, "", self.cluster)
        self._status(crashes=crashes)
        return verdict

    def _requeue(self, verdict: Verdict, exclude: list[str]) -> int:
        """Hands the run on to the job's next start."""
        now = slurm.state(self.job.number)
        if now == "CANCELLED":
            self._status(state="cancelled", why="the job was cancelled; the same sbatch goes on with the run")
        if now != "RUNNING":
            return DONE  # else SLURM requeues it: a node failed, or another job comes first
        try:
            slurm.requeue(self.job.number, delay_seconds=verdict.delay, exclude=exclude)
        except UserError as error:
            self._status(state="failed", kind=CRASH, why=f"cannot requeue: {error}")
            _say(f"cannot requeue: {error}")
            return FAILED
        return DONE

    def _refuse_a_second_one(self) -> None:
        """Raises UserError where another job trains this run."""
        status = read_status(self.run)
        other = status.get("job")
        mine = self.job.number if self.job is not None else None
        if other not in (None, mine) and status.get("state") in UNDER_WAY and slurm.alive(other):
            raise UserError(f"{self.run}: job {other} trains this run; wait for it, cancel it, or name another run")

    # ----------------------------------------------------------------------------------------------------------- status

    def _catch(self, number: int, _frame: Any) -> None:
        self._stopped = signal.Signals(number).name
        _say(f"{self._stopped}: asks for a checkpoint")
        if self._child is not None:
            self._child.ask_to_stop()

    def _read_status(self) -> dict[str, Any]:
        return read_status(self.run) | {"checkpoint": newest_checkpoint(self.run)}

    def _status(self, **changes: Any) -> None:
        update_status(self.run, **changes)

    def _write(self, verdict: Verdict) -> None:
        self._status(state=verdict.state, kind=verdict.kind, why=verdict.why)
        told = {"finished": "The run is finished.", "requeued": "The run goes on"}.get(verdict.state)
        told = told or f"The run ends here: {verdict.state}"
        told += f" in {verdict.delay} s" if verdict.delay else ""
        _say(f"{told}{f' ({verdict.kind})' if verdict.kind else ''}{f': {verdict.why}' if verdict.why else ''}")


def newest_checkpoint(run: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none."""
    try:
        return int((run / "checkpoints/latest").read_text(encoding="utf-8").split("-")[1])
    except (OSError, ValueError, IndexError):
        return 0


def _own_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _free_port() -> int:
    """On this machine, the job's first, where rank 0 will be."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _say(message: str) -> None:
    print(f"ecdit supervise: {message}", file=sys.stderr, flush=True)
