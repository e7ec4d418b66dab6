"""Samples and scores while a run trains: evaluates its checkpoints beside it, and never stands in its way.

The training loop only says which steps are due. A thread waits for their checkpoints, starts a process or a job for
each, one after the other, and looks how it ends; what it has to say is told after a step. Where evaluations take longer
than the steps between them, some are left out rather than queued: each waiting one would keep a checkpoint.
"""

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ecdit.callbacks import Callback
from ecdit.errors import UserError
from ecdit.evaluate import held, wanted
from ecdit.recipe import Recipe
from ecdit.run import Run
from ecdit.stop import StopRequest
from parallel.checkpoint.folder import committed, step_of

if TYPE_CHECKING:
    from ecdit.train import Trainer

SECONDS_BETWEEN_LOOKS = 0.5  # for a checkpoint


class Task(Protocol):
    """An evaluation that was started. identity: what tells it apart, as JSON; log: what it says; outlives: whether it
    goes on when training has ended; pause: seconds between looks at it."""

    identity: dict[str, Any]
    log: Path
    outlives: bool
    pause: float

    def ended(self) -> bool:
        """Whether it runs no more."""

    def stop(self) -> None:
        """Ends it."""


class Starter(Protocol):
    """Starts evaluations."""

    def start(self, run: Run, step: int) -> Task:
        """Of a step's checkpoint. Raises OSError or UserError where it cannot be started."""

    def alive(self, identity: dict[str, Any]) -> bool:
        """Whether one that an earlier process started may still run."""


class Evaluation(Callback):
    """`evaluation` of the recipe. patience: seconds to wait at the end for an evaluation that does not outlive the
    training; None: until it is done, or `stop` says otherwise."""

    def __init__(self, recipe: Recipe, run: Run, starter: Starter, stop: StopRequest, patience: float | None = None):
        """Raises UserError for what an evaluation would be refused for."""
        wanted.check(recipe, run)
        self._recipe, self._stop, self._patience = recipe, stop, patience
        self._attendant = Attendant(recipe, run, starter)

    def on_start(self, trainer: "Trainer") -> None:
        self._attendant.start()

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        if wanted.is_due(self._recipe, record["step"]):
            self._attendant.ask(record["step"])
        self._tell(trainer)

    def on_end(self, trainer: "Trainer") -> None:
        finished = trainer.progress.step == self._recipe.train.steps
        self._attendant.finish(now=not finished)
        if finished and self._attendant.holds_up():
            self._say(trainer, "Training is done; its last evaluation is waited for. Ctrl-C leaves it.")
        waited = 0.0
        while self._attendant.is_alive() and self._stop.signal is None:
            if self._patience is not None and waited >= self._patience:
                break
            self._attendant.join(SECONDS_BETWEEN_LOOKS)
            waited += SECONDS_BETWEEN_LOOKS
            self._tell(trainer)
        self._attendant.finish(now=True)
        self._attendant.join()
        self._tell(trainer)

    def _tell(self, trainer: "Trainer") -> None:
        while self._attendant.messages:
            self._say(trainer, self._attendant.messages.popleft())

    @staticmethod
    def _say(trainer: "Trainer", message: str) -> None:
        for callback in trainer.callbacks:
            callback.on_message(message)


class Attendant(threading.Thread):
    """Evaluates the steps that it is asked for, one at a time; one more may wait."""

    def __init__(self, recipe: Recipe, run: Run, starter: Starter):
        super().__init__(name="evaluation", daemon=True)
        self.messages: deque[str] = deque()
        self._recipe, self._run, self._starter = recipe, run, starter
        self._changed = threading.Condition()
        self._next: int | None = None
        self._task: Task | None = None
        self._no_more = self._now = False
        self._left: dict[int, dict[str, Any]] = {}  # under way, started by an earlier process

    def ask(self, step: int) -> None:
        """Evaluate the step's checkpoint, which need not be there yet. Raises OSError where nothing can be written."""
        held.hold(self._run, step)
        with self._changed:
            left, self._next = self._next, step
            self._changed.notify()
        if left is not None:
            self._give_up(left, "the one before it was not done yet")

    def finish(self, *, now: bool) -> None:
        """Ends once all is done, or now."""
        with self._changed:
            self._no_more, self._now = True, self._now or now
            self._changed.notify()

    def holds_up(self) -> bool:
        """Whether something is to be done that ends with this process."""
        with self._changed:
            return self._next is not None or (self._task is not None and not self._task.outlives)

    def start(self) -> None:
        """From now on."""
        self._left = held.held(self._run)
        super().start()

    def run(self) -> None:
        """Of the thread."""
        self._take_up()
        while (step := self._take()) is not None:
            try:
                self._look_after_left()
                self._evaluate(step)
            except Exception as error:  # whatever it is, training goes on
                self._give_up(step, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    def _take_up(self) -> None:
        """What an earlier process has left: the newest checkpoint that is due, has no scores and is not under way."""
        self._look_after_left()
        due = [step for step in map(step_of, committed(self._run.checkpoints)) if wanted.is_due(self._recipe, step)]
        if due and due[-1] not in self._left and not wanted.is_done(self._recipe, self._run, due[-1]):
            with self._changed:
                waiting = self._next is not None
            if not waiting:
                self.ask(due[-1])

    def _look_after_left(self) -> None:
        """Those that run no more need their checkpoint no more."""
        for step, by in list(self._left.items()):
            if not (by and self._starter.alive(by)):
                del self._left[step]
                held.release(self._run, step)

    def _take(self) -> int | None:
        with self._changed:
            while self._next is None and not self._no_more:
                self._changed.wait()
            step, self._next = self._next, None
        if step is not None and self._now:
            self._give_up(step, "training has stopped", told=False)
            return None
        return step

    def _evaluate(self, step: int) -> None:
        if not self._wait(lambda: self._is_saved(step), SECONDS_BETWEEN_LOOKS, self._is_too_late):
            self._give_up(step, "it has no checkpoint")
            return
        task = self._starter.start(self._run, step)
        held.hold(self._run, step, task.identity)
        with self._changed:
            self._task = task
        leave = (lambda: self._no_more) if task.outlives else (lambda: self._now)
        ended = self._wait(task.ended, task.pause, leave)
        with self._changed:
            self._task = None
        if ended:
            held.release(self._run, step)
            self.messages.append(self._told(step, task))
        elif task.outlives:
            self.messages.append(f"The evaluation of step {step} goes on by itself; it says: {task.log}")
        else:
            task.stop()
            self._give_up(step, "training has ended")

    def _told(self, step: int, task: Task) -> str:
        if wanted.is_done(self._recipe, self._run, step):
            found = wanted.outcome(self._recipe, self._run, step)
            return f"Step {step} is evaluated{f': {found}' if found else ''}."
        try:
            lines = [line for line in task.log.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError:
            lines = []
        last = lines[-1].strip() if lines else "it said nothing"
        return f"The evaluation of step {step} failed: {last} (all of it: {task.log}). Training goes on."

    def _wait(self, ready: Callable[[], bool], pause: float, leave: Callable[[], bool]) -> bool:
        """Until something is ready; False where it is to be left before."""
        while not ready():
            with self._changed:
                if leave():
                    return ready()  # which it may have become since
                self._changed.wait(pause)
        return True

    def _is_saved(self, step: int) -> bool:
        return step in map(step_of, committed(self._run.checkpoints))

    def _is_too_late(self) -> bool:
        """A save that failed is not repeated."""
        return self._no_more or (self._next is not None and self._is_saved(self._next))

    def _give_up(self, step: int, why: str, *, told: bool = True) -> None:
        held.release(self._run, step)
        if told:
            again = f"ecdit {' '.join(wanted.arguments(self._recipe, self._run, step))}"
            self.messages.append(f"Step {step} is not evaluated: {why}. While its checkpoint is kept: {again}")
