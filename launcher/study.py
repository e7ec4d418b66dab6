"""`ecdit study`: runs what is missing of a comparison of models, on the GPUs of this machine or as SLURM jobs.

A run is trained to its last step, scored and, for the first seed, analysed, each by a process of its own that resumes.
What is there is not done again, so a study that was stopped in any way goes on when the same command is typed again,
and goes further with more `train.steps`.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ecdit.errors import UserError
from ecdit.evaluate.held import held
from ecdit.status import BAD_INPUT, read_status
from ecdit.stop import StopRequest
from ecdit.study.plan import Study, StudyRun
from ecdit.study.read import RunResult, results_of
from ecdit.terminal import console
from launcher import slurm
from launcher.launch import launch
from parallel.checkpoint import CheckpointError
from parallel.checkpoint.folder import MANIFEST, committed, step_of
from parallel.checkpoint.lock import FolderLock, NoLocks

STOPPED = 75
SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_SAVE = 60.0  # that a run may take to stop with a checkpoint, before it is killed
ENDED = ("finished", "failed", "cancelled")


@dataclass
class Failure:
    """A run that ended with an error, and where it says why."""

    name: str
    why: str
    log: Path


class Runner:
    """The runs of a study. on_slurm: jobs train and score them, and here they are analysed alone. `failures`: those
    that could not be done; `stopped`: whether something is left to do because time was up or a signal came.

    Raises UserError where what is there was trained on other terms."""

    def __init__(self, study: Study, *, on_slurm: bool = False):
        for result in results_of(study):
            result.check()
        self.study, self.on_slurm = study, on_slurm
        self.failures: list[Failure] = []
        self.stopped = False

    def _result(self, run: StudyRun) -> RunResult:
        return RunResult(run, self.study.folder, run.recipe.train.steps)

    def _is_trained(self, run: StudyRun) -> bool:
        return self._result(run).trained >= run.recipe.train.steps

    # ------------------------------------------------------------------------------------------------------- what to do

    def tasks(self, run: StudyRun, ranks: int = 1) -> Iterator[list[str]]:
        """The commands that are still missing of a run, each asked for when the one before is done."""
        many = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
        command = [sys.executable, "-m", *many, "ecdit.cli"]
        result = self._result(run)
        folder = str(result.place.folder)
        if not self._is_trained(run) and not self.on_slurm:
            yield [*command, "train", str(run.file), *run.overrides, "--runs", str(self.study.folder)]
        if self._is_to_be_scored(result) and not self.on_slurm:
            suite = ["--suite", "shapes", "--step", str(result.step), "-n", str(self.study.plan.pictures)]
            yield [*command, "evaluate", folder, *suite]
        if self._is_to_be_analysed(run):
            yield [sys.executable, "-m", "ecdit.cli", "analyze", folder]

    @staticmethod
    def _is_to_be_scored(result: RunResult) -> bool:
        """While it has a checkpoint of the step: one that has gone on beyond it may have none any more."""
        steps = [step_of(folder) for folder in committed(result.place.checkpoints)]
        return result.step in steps and not result.scores_file.exists()

    def _is_to_be_analysed(self, run: StudyRun) -> bool:
        """Runs with experts, of the first seed, since their newest checkpoint."""
        if not run.recipe.model.grouped or run.seed != self.study.seeds[0] or not self._is_trained(run):
            return False
        found = self._result(run).analysis
        newest = committed(self._result(run).place.checkpoints)[-1] / MANIFEST
        return found is None or (found / "analysis.json").stat().st_mtime < newest.stat().st_mtime

    # -------------------------------------------------------------------------------------------------- on this machine

    def run_here(self, stop: StopRequest, *, seconds: float | None, ranks: int) -> None:
        """One run a GPU, or `ranks` GPUs by torchrun, at a time; without GPUs one after the other.

        After so many seconds, or a signal, runs are told to stop: they save a checkpoint.
        """
        until = float("inf") if seconds is None else time.monotonic() + seconds
        waiting = deque(run for run in self.study.runs if next(self.tasks(run), None))
        places, busy = places_of(gpus(), ranks), []
        while waiting or busy:
            if stop.signal is not None or time.monotonic() > until:
                self.stopped = True
                stop_all(busy)
                return
            for _ in range(len(waiting)):  # a run that another study is at waits for its turn again
                if not places:
                    break
                run = waiting.popleft()
                if is_locked(self._result(run).place.folder):
                    waiting.append(run)
                elif self._is_alike(run):
                    busy.append(_Process(self, run, places.pop(), ranks))
            for process in [one for one in busy if one.has_ended()]:
                busy.remove(process)
                places.append(process.place)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _is_alike(self, run: StudyRun) -> bool:
        """Still so: another study may have trained it on other terms. The page names those when all have ended."""
        try:
            self._result(run).check()
        except UserError:
            return False
        return True

    def failed(self, run: StudyRun, log: Path, code: int) -> None:
        """The others go on."""
        status = read_status(self._result(run).place.folder)
        why = status.get("why") if status.get("state") == "failed" else ""
        self.failures.append(Failure(run.name, why or _last_line(log) or f"exit code {code}", log))
        console.print(f"{run.name} failed: {self.failures[-1].why} ({log})", markup=False)

    # --------------------------------------------------------------------------------------------------------- on SLURM

    def submit(self) -> None:
        """A job for each run that is not done and has none; it also scores the last step, as `evaluation` of a recipe
        does. Raises UserError with what sbatch says."""
        for run in self.study.runs:
            result = self._result(run)
            missing = not self._is_trained(run) or self._is_to_be_scored(result)
            if missing and not self._under_way(run):
                number = launch(run.file, [*run.overrides, *self._scored(run)], None, self.study.folder)
                console.print(f"{run.name}: job {number}", markup=False)

    def _scored(self, run: StudyRun) -> list[str]:
        saved = run.recipe.checkpoint.every
        beyond = -(-run.recipe.train.steps // saved) * saved
        return [
            f"evaluation.every={beyond}",
            "evaluation.suites=[shapes]",
            f"evaluation.options={{n: {self.study.plan.pictures}}}",
            "evaluation.where=job",
        ]

    def wait(self, stop: StopRequest) -> None:
        """Until every run has ended, or has no job that could still end it."""
        while any(map(self._under_way, self.study.runs)) and stop.signal is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self.stopped = stop.signal is not None
        for run in self.study.runs:
            status = read_status(self._result(run).place.folder)
            if status.get("state") == "failed":
                log = self._result(run).place.folder / "logs"
                self.failures.append(Failure(run.name, status.get("why", BAD_INPUT), log))

    def _under_way(self, run: StudyRun) -> bool:
        """Its job, or that of its scores."""
        place = self._result(run).place
        status = read_status(place.folder)
        trains = status.get("state") not in ENDED and slurm.alive(status.get("job"))
        return trains or any(slurm.alive(by.get("job")) for by in held(place).values())


class _Process:
    """A run's missing tasks, one after the other, in its place."""

    def __init__(self, runner: Runner, run: StudyRun, place: str | None, ranks: int):
        """place: what CUDA_VISIBLE_DEVICES shall be; None: as it is."""
        self.place, self._runner, self._run = place, runner, run
        self._tasks = runner.tasks(run, ranks)
        self._log = runner.study.folder / run.name / "logs" / "study.log"
        self._process: subprocess.Popen | None = None
        self._next()

    def _next(self) -> None:
        command = next(self._tasks, None)
        if command is None:
            self._process = None
            return
        word = command[command.index("ecdit.cli") + 1]
        where = f" on GPU {self.place}" if self.place is not None else ""
        console.print(f"{self._run.name}: {word}{where}", markup=False)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if self.place is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.place
            # as torchrun does: several processes that each take all cores wait for one another at every small operation
            environment.setdefault("OMP_NUM_THREADS", "1")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the study, which tells its runs
            )

    def has_ended(self) -> bool:
        """Whether all of its tasks are done, or one has failed."""
        if self._process is None:
            return True
        code = self._process.poll()
        if code is None:
            return False
        if code == STOPPED:  # by someone else, with a checkpoint
            self._runner.stopped = True
            return True
        if code:
            self._runner.failed(self._run, self._log, code)
            return True
        self._next()
        return self._process is None

    def tell(self) -> None:
        """To stop: training saves a checkpoint; what draws goes on another time from the pictures that are there."""
        if self._process is not None:
            self._process.terminate()  # not the group: the processes that read data are the training's to end

    def end(self, seconds: float) -> None:
        """Waits so long for it, and then kills it with all that it has started."""
        if self._process is None:
            return
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def stop_all(processes: Sequence[_Process]) -> None:
    """Together, so that it takes no longer than the slowest."""
    for process in processes:
        process.tell()
    until = time.monotonic() + SECONDS_TO_SAVE
    for process in processes:
        process.end(max(0.0, until - time.monotonic()))


def gpus() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch  # takes seconds to import

    return [str(number) for number in range(torch.cuda.device_count())]


def places_of(devices: Sequence[str], ranks: int) -> list[str | None]:
    """One for each run at a time."""
    groups = [",".join(devices[i : i + ranks]) for i in range(0, len(devices) - ranks + 1, ranks)]
    return list(reversed(groups)) or [None]


def is_locked(folder: Path) -> bool:
    """Whether some process is training in it. Where nothing can be locked it says no, and the run itself why."""
    try:
        FolderLock(folder / "lock").release()
    except NoLocks:
        return False
    except CheckpointError:
        return True
    return False


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
