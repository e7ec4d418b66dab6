"""The training loop: one order of samples, one loop for every layout, a checkpoint whenever it has to stop."""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ecdit.assemble import assemble_engine, check_job, start_topology
from ecdit.callbacks import Callback
from ecdit.data.inputs import Inputs, open_stream
from ecdit.data.stream import Batch
from ecdit.diffusion.draws import draw
from ecdit.diffusion.masking import keep_count, ratio_at
from ecdit.diffusion.objective import MicroBatch
from ecdit.dtypes import DTYPES
from ecdit.errors import UserError, explain
from ecdit.model.count import forward_flops
from ecdit.peak import peak_flops
from ecdit.recipe import Recipe
from ecdit.run import Run
from ecdit.saves import Progress, Saves
from ecdit.schedule import learning_rate
from ecdit.status import (
    NOT_FINITE,
    SECONDS_BETWEEN_UPDATES,
    SUPERVISED,
    RunLocked,
    fail,
    record_failure,
    update_status,
)
from ecdit.step import Launched, Result, Step
from ecdit.stop import StopRequest
from parallel import topology
from parallel.checkpoint import CheckpointError
from parallel.checkpoint.folder import committed
from parallel.checkpoint.lock import FolderLock, NoLocks
from parallel.collectives import measured
from parallel.device import to_device
from parallel.failure import together
from parallel.graph import own_stream
from parallel.topology import Topology
from parallel.watchdog import Watchdog

# exit codes: done, a run that cannot go on, bad input (see `explain`), stopped with a checkpoint
DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
MOST_SKIPPED_IN_A_ROW = 10


class Trainer:
    """Everything that a training run holds, and its loop."""

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        callbacks: list[Callback],
        place: Topology,
        stop: StopRequest,
        end_all: Callable[[str], None],
    ):
        """`end_all`: ends the processes of all ranks with a message."""
        self.recipe, self.run, self.callbacks, self.topology = recipe, run, callbacks, place
        self._stop, self._end_all = stop, end_all
        device = place.device
        check_job(recipe, place)
        self._saves = Saves(recipe, run, place, self._tell)  # before anything else is loaded: it may refuse
        self.stream = open_stream(recipe, self.topology.data_rank, self.topology.data_ranks)
        self.inputs = Inputs(recipe, self.stream.encoded, place, DTYPES[recipe.train.precision])
        self.engine = assemble_engine(recipe, place)
        self._step = Step(recipe, self.engine, place)
        # a GPU computes a step while the host reports the one before and prepares the next
        self._ahead = int(device.type == "cuda")
        self._ended = 0.0
        self.progress = Progress()
        self.peak = peak_flops(device, DTYPES[recipe.train.precision]) * self.topology.ranks
        self.owns_folder = False
        self._complained: set[Callback] = set()
        self._status_told = float("-inf")
        self._notify(lambda callback: callback.check(self))

    def fit(self) -> int:
        """Trains to the last step or until told to stop. Returns the exit code.

        Raises UserError where another run is in the folder, or what is in it does not fit the recipe.
        """
        with _alone(self.run, self.topology):
            return self._fit()

    def _fit(self) -> int:
        self.progress = self._saves.resume(self.engine)
        self.owns_folder = True  # the first rank has the lock, for it took part in that
        if self.progress.step > self.recipe.train.steps:
            self._tell(f"It has more than train.steps: {self.recipe.train.steps} already: nothing to do.")
            return DONE
        if self.topology.first and self.progress.step < self.recipe.train.steps:  # else nothing is trained by it
            self.run.write_recipe(self.recipe)
        self._stop.tell = self._tell
        hang = self.recipe.cluster.hang
        self._watchdog = Watchdog(
            self.run.log_file(self.topology.rank),
            times_median=hang.times_median,
            seconds=hang.seconds,
            on_hang=self._end_all,
        )
        self._notify(lambda callback: callback.on_start(self))
        try:
            code = self._loop()
        finally:
            self._watchdog.close()
            self._notify(lambda callback: callback.on_end(self))
        if code == DONE:
            self._status(state="finished", why="", step=self.progress.step)
        return code

    def _loop(self) -> int:
        self._status(state="running", why="", kind="", step=self.progress.step, ranks=self.topology.ranks)
        batches, launched = self.stream.batches(self.progress.step, self.topology.device), deque[Launched]()
        step, last = self.progress.step, self.recipe.train.steps
        while step < last:
            with self._watchdog.step(), self._measured(step + 1):
                launched.append(self._launch(step, batches))
                step += 1
                ended = _wait(launched, leaving=0 if self._is_seen(step) else self._ahead)
            for one in ended:
                self._report_step(*one)
            if self.progress.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
                return self._give_up()
            if any(result.stop for _, result, _ in ended):
                self._saves.save_and_wait(self.engine, self.progress)
                why = self._stop.signal or "another rank was told to stop"
                self._status(state="requeue", why=why, step=step)
                return STOPPED
            if step == last:
                self._saves.save_and_wait(self.engine, self.progress)
            elif step % self.recipe.checkpoint.every == 0:
                self._saves.save(self.engine, self.progress)
        return DONE

    def _is_seen(self, step: int) -> bool:
        """Whether something is done with the weights as they are after so many steps, or the next is measured alone."""
        recipe = self.recipe
        if step == recipe.train.steps or recipe.log.collectives - step in (0, 1):
            return True
        seen = [recipe.checkpoint.every, recipe.log.grid_every]
        seen += [recipe.log.held_out.every] if recipe.log.held_out.path else []
        return any(every and step % every == 0 for every in seen)

    def _launch(self, step: int, batches: Iterator[Batch]) -> Launched:
        began, schedule = time.perf_counter(), self.recipe.optimizer
        batch = next(batches)
        waited = time.perf_counter() - began
        lr = learning_rate(
            step, lr=schedule.lr, warmup=schedule.warmup, steps=self.recipe.train.steps, kind=schedule.schedule
        )
        return self._step(
            step,
            self._micro_batches(batch),
            lr,
            stop=self._stop.signal is not None,
            logged=(step + 1) % self.recipe.log.every == 0 or step + 1 == self.recipe.train.steps,
            began=began,
            waited=waited,
            samples=batch.samples,
        )

    def _report_step(self, launched: Launched, result: Result, ended: float) -> None:
        about, recipe = launched.about, self.recipe
        # while steps overlap, one takes as long as it ends after the one before
        seconds, self._ended = ended - max(about["began"], self._ended), ended
        step = self.progress.step
        self._count(applied=result.applied)
        self._report(
            {
                "step": self.progress.step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": about["lr"],
                "images_per_s": recipe.train.batch / seconds,
                "mfu": self._step_flops(step) / seconds / self.peak,
                "seconds": seconds,
                "waited": about["waited"],
                "skipped": self.progress.skipped,
                **({"memory": result.memory} if launched.logged else {}),
                **result.routing,
                **({"sample_ids": self.topology.gather(about["samples"].keys)} if recipe.log.samples else {}),
                "logged": launched.logged,
            }
        )
        self._saves.tell_of_failed()

    @contextmanager
    def _measured(self, step: int) -> Iterator[None]:
        """The step whose collectives are to be measured is, and what is found is written."""
        if step != self.recipe.log.collectives:
            yield
            return
        with measured() as found:
            yield
        if self.topology.first:
            text = json.dumps({"step": step, **vars(found)}, indent=1)
            self.run.collectives_file.write_text(text + "\n", encoding="utf-8")

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        device, size = self.topology.device, self.recipe.train.micro_batch
        for first in range(0, len(batch.positions), size):
            part = slice(first, first + size)
            samples, positions = batch.samples[part], batch.positions[part]
            text, mask = self.inputs.text(batch.step, samples, positions)
            latents = self.inputs.latents(batch.step, samples, positions)
            draws = draw(self.recipe, batch.step, to_device(positions, device))
            yield MicroBatch(latents, text, mask, draws)

    def _count(self, *, applied: bool) -> None:
        self.progress.step += 1
        self.progress.updates += applied
        self.progress.skipped += not applied
        self.progress.skipped_in_a_row = 0 if applied else self.progress.skipped_in_a_row + 1

    def _step_flops(self, step: int) -> float:
        return 3 * forward_flops(self.recipe.model, self._tokens(step)) * self.recipe.train.batch

    def _tokens(self, step: int) -> int:
        """Tokens of an image that enter the backbone."""
        return keep_count(self.recipe.model.tokens, ratio_at(self.recipe.masking.schedule, step))

    def _give_up(self) -> int:
        """Ends a run whose losses stay non-finite, leaving its checkpoints as they are."""
        self._saves.wait()
        good = committed(self.run.checkpoints)
        newest = f"The newest checkpoint is {good[-1]}." if good else "There is no checkpoint before it."
        if self.topology.first:
            fail(self.run.folder, NOT_FINITE, "the loss or a gradient was not finite, ten steps in a row")
        self._tell(
            f"The loss or a gradient was not finite in the last {MOST_SKIPPED_IN_A_ROW} steps, the first of them step "
            f"{self.progress.step - MOST_SKIPPED_IN_A_ROW + 1}; none of them changed a weight. {newest} "
            f"Look at optimizer.lr ({self.recipe.optimizer.lr:g}), the data, and {self.run.metrics_file}."
        )
        return FAILED

    def _report(self, record: dict[str, Any]) -> None:
        self._notify(lambda callback: callback.on_step(self, record))
        if time.monotonic() - self._status_told > SECONDS_BETWEEN_UPDATES:
            self._status_told = time.monotonic()
            self._status(step=record["step"], hang_seconds=self._watchdog.limit)
        if record["logged"] and not self.topology.first:
            self._tell(f"step {record['step']}: loss {record['loss']:.6g}, {record['seconds']:.3f} s")

    def _notify(self, call: Callable[[Callback], None]) -> None:
        """Calls the callbacks. One that cannot write (a full disk, say) does not end the run."""
        for callback in self.callbacks:
            if not (self.topology.first or callback.every_rank):
                continue
            try:
                call(callback)
            except OSError as error:
                if callback not in self._complained:
                    self._complained.add(callback)
                    self._tell(f"{type(callback).__name__}: {error}. The run goes on without what it would write.")

    def _tell(self, message: str) -> None:
        if not self.topology.first:
            print(message, flush=True)  # to this rank's log
            return
        for callback in self.callbacks:
            callback.on_message(message)

    def _status(self, **changes: Any) -> None:
        if self.topology.first:
            update_status(self.run.folder, **changes)


def _wait(launched: deque[Launched], leaving: int) -> list[tuple[Launched, Result, float]]:
    """Waits for all launched steps but the last `leaving`; of each, what it found and when it was there.

    Once a rank was told to stop, which all ranks find in the same step, none is left.
    """
    ended = []
    while len(launched) > leaving:
        one = launched.popleft()
        ended.append((one, one.result(), time.perf_counter()))
        leaving = 0 if ended[-1][1].stop else leaving
    return ended


def train(recipe: Recipe, runs: Path, callbacks: list[Callback], stop: StopRequest | None = None) -> int:
    """Trains `recipe` in `runs/NAME`, from its newest checkpoint if it has one. Returns the exit code.

    The first signal to stop (`StopRequest`) is obeyed at a step's edge. Raises UserError for bad input, before the
    first step.
    """
    run = Run(runs / recipe.run)
    stop = (stop or StopRequest()).listen()
    trainer: Trainer | None = None

    def report(rank: int, error: BaseException) -> None:
        # a command that was refused because another run is in the folder does not write into that one's status
        if SUPERVISED in os.environ or (trainer is not None and trainer.owns_folder):
            record_failure(run.folder, rank, error)

    try:
        try:
            place = start_topology(recipe)
        except Exception as error:
            report(int(os.environ.get("RANK", 0)), error)
            raise
        # DeepSpeed's streams wait for the default one
        stream = own_stream(place.device) if recipe.engine == "megatron" else nullcontext()
        with stream, together(place, run.log_file(place.rank), explain, report) as end_all:
            trainer = Trainer(recipe, run, callbacks, place, stop, end_all)
            return trainer.fit()
    finally:
        stop.close()
        topology.stop()


@contextmanager
def _alone(run: Run, place: Topology) -> Iterator[None]:
    """Keeps other runs out of the folder. Raises UserError where one is in it, or nothing can keep it out."""
    if not place.first:
        yield
        return
    try:
        lock = FolderLock(run.folder / "lock")
    except NoLocks as error:
        raise UserError(str(error)) from None
    except CheckpointError as error:
        raise RunLocked(str(error)) from None
    try:
        yield
    finally:
        lock.release()
