"""The training loop: one order of samples, one loop for every layout, a checkpoint whenever it has to stop."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecdit.assemble import DTYPES, assemble_engine, check_job, start_topology
from ecdit.callbacks import Callback
from ecdit.data.encoders import load_checked_autoencoder, load_text_encoder
from ecdit.data.stream import Batch, TrainStream
from ecdit.diffusion.draws import draw, drop_captions
from ecdit.diffusion.masking import keep_count, ratio_at
from ecdit.diffusion.objective import MicroBatch, objective, to_differentiate
from ecdit.errors import UserError
from ecdit.model.count import forward_flops
from ecdit.peak import peak_flops
from ecdit.recipe import Recipe
from ecdit.recipe_io import dump_recipe
from ecdit.run import Run, check_same_model
from ecdit.schedule import learning_rate
from ecdit.statistics import RoutingStatistics
from parallel import checkpoint, topology
from parallel.failure import together
from parallel.topology import Topology

# exit codes: done, a run that cannot go on, bad input, stopped with a checkpoint
DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75
MOST_SKIPPED_IN_A_ROW = 10


@dataclass
class Progress:
    """Where a run stands: finished steps, applied updates, and skipped ones in all and in a row."""

    step: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Trainer:
    """Everything that a training run holds, and its loop."""

    def __init__(self, recipe: Recipe, run: Run, callbacks: list[Callback], place: Topology):
        self.recipe, self.run, self.callbacks, self.topology = recipe, run, callbacks, place
        device = place.device
        check_job(recipe, place)
        self.stream = open_stream(recipe, self.topology.data_rank, self.topology.data_ranks)
        self.text_encoder = load_text_encoder(
            recipe.data.text_encoder,
            width=recipe.model.text_width,
            tokens=recipe.model.text_tokens,
            device=device,
            dtype=DTYPES[recipe.train.precision],
        )
        self.autoencoder = load_checked_autoencoder(recipe, device)
        self.engine = assemble_engine(recipe, place)
        routed = [layer for layer in range(recipe.model.layers) if recipe.model.sparse(layer) and recipe.model.grouped]
        self._routed = routed, [layer for layer in routed if str(layer) in self.engine.model.blocks]
        self.progress = Progress()
        self.peak = peak_flops(device, DTYPES[recipe.train.precision]) * self.topology.ranks
        self._stop = False
        self._complained: set[Callback] = set()

    def fit(self) -> int:
        """Trains to the last step or until told to stop. Returns the exit code."""
        self._resume()
        if self.topology.first:
            self.run.write_recipe(self.recipe)
        with self._signals():
            self._notify(lambda callback: callback.on_start(self))
            try:
                return self._loop()
            finally:
                self._notify(lambda callback: callback.on_end(self))

    def _loop(self) -> int:
        batches = self.stream.batches(self.progress.step)
        while self.progress.step < self.recipe.train.steps:
            self._report(self._step(next(batches)))
            if self.progress.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
                return self._give_up()
            if self.topology.agree(self._stop):
                self._save(final=True)
                return STOPPED
            if self.progress.step % self.recipe.checkpoint.every == 0:
                self._save(final=self.progress.step == self.recipe.train.steps)
        if self.progress.step % self.recipe.checkpoint.every:
            self._save(final=True)
        return DONE

    def _step(self, batch: Batch) -> dict[str, Any]:
        recipe, step, began = self.recipe, self.progress.step, time.perf_counter()
        logged = (step + 1) % recipe.log.every == 0 or step + 1 == recipe.train.steps
        device, images = self.topology.device, recipe.train.batch // self.topology.data_ranks
        routing = RoutingStatistics(*self._routed, device)
        velocity = torch.zeros((), device=device)

        def loss(model: nn.Module, micro: MicroBatch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
            per_image, extra, out = objective(model, micro, recipe, hidden)
            if logged:
                routing.add(out.plans)
            if per_image is not None:
                velocity.add_(per_image.detach().sum() / images)
            return to_differentiate(per_image, extra, out, len(micro.latents), images)

        count = images // recipe.train.micro_batch
        shape = self.engine.model.hidden_shape(recipe.train.micro_batch, self._kept(step))
        total = self.engine.accumulate(self._micro_batches(batch), count, loss, shape)
        # every tensor rank has its data rank's loss, on the last stage
        velocity = self.topology.sum(velocity / (self.topology.data_ranks * self.topology.layout.tensor)).item()
        schedule = recipe.optimizer
        lr = learning_rate(
            step, lr=schedule.lr, warmup=schedule.warmup, steps=recipe.train.steps, kind=schedule.schedule
        )
        finite = bool(total.isfinite())
        update = self.engine.update(lr) if finite else None
        self._count(applied=update is not None and update.applied)
        seconds = time.perf_counter() - began
        return {
            "step": self.progress.step,
            "loss": velocity,
            "grad_norm": update.grad_norm if update else float("nan"),
            "lr": lr,
            "images_per_s": recipe.train.batch / seconds,
            "mfu": self._step_flops(step) / seconds / self.peak,
            "seconds": seconds,
            "skipped": self.progress.skipped,
            **(routing.record(self.topology.sum(routing.sums())) if logged else {}),
            **({"sample_ids": self.topology.gather(batch.keys)} if recipe.log.samples else {}),
            "logged": logged,
        }

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        device, size = self.topology.device, self.recipe.train.micro_batch
        for first in range(0, len(batch.captions), size):
            part = slice(first, first + size)
            positions = batch.positions[part]
            captions = drop_captions(self.recipe, batch.step, positions, batch.captions[part])
            text, mask = self.text_encoder(captions)
            latents = self.autoencoder.encode(batch.images[part].to(device))
            draws = draw(self.recipe, batch.step, positions.to(device))
            yield MicroBatch(latents.float(), text, mask, draws)

    def _count(self, *, applied: bool) -> None:
        self.progress.step += 1
        self.progress.updates += applied
        self.progress.skipped += not applied
        self.progress.skipped_in_a_row = 0 if applied else self.progress.skipped_in_a_row + 1

    def _step_flops(self, step: int) -> float:
        return 3 * forward_flops(self.recipe.model, self._kept(step)) * self.recipe.train.batch

    def _kept(self, step: int) -> int:
        """Tokens of an image that enter the backbone."""
        return keep_count(self.recipe.model.tokens, ratio_at(self.recipe.masking.schedule, step))

    def _give_up(self) -> int:
        """Ends a run whose losses stay non-finite, leaving its checkpoints as they are."""
        good = checkpoint.committed(self.run.checkpoints)
        newest = f"The newest checkpoint is {good[-1]}." if good else "There is no checkpoint before it."
        self._tell(
            f"The loss or a gradient was not finite in the last {MOST_SKIPPED_IN_A_ROW} steps, the first of them step "
            f"{self.progress.step - MOST_SKIPPED_IN_A_ROW + 1}; none of them changed a weight. {newest} "
            f"Look at optimizer.lr ({self.recipe.optimizer.lr:g}), the data, and {self.run.metrics_file}."
        )
        return FAILED

    def _save(self, *, final: bool) -> None:
        """Writes a checkpoint. One that fails does not end the run, except where there is no later chance."""
        step, state = self.progress.step, self.engine.state()
        meta = {
            "updates": self.progress.updates,
            "skipped": self.progress.skipped,
            "optimizer": self.recipe.optimizer.name,
            "recipe": dump_recipe(self.recipe),
        }
        if not self.topology.first:
            return
        try:
            checkpoint.save(self.run.checkpoints, step, state, meta, self.recipe.checkpoint.keep_last)
        except checkpoint.CheckpointError as error:
            kept = checkpoint.committed(self.run.checkpoints)
            told = f"{error}; {f'{kept[-1].name} is kept' if kept else 'there is none before it'}"
            if final:
                raise UserError(f"{told}. Make room and type the same command again.") from None
            self._tell(f"{told}. The run goes on and tries again at the next checkpoint.")

    def _resume(self) -> None:
        saved, messages = self.run.newest_checkpoint()
        for message in messages:
            self._tell(message)
        if saved is None:
            return
        check_same_model(self.recipe, saved)
        self.engine.load(saved.tensors(), saved.meta["updates"])
        self.progress = Progress(saved.step, saved.meta["updates"], saved.meta["skipped"])
        self._tell(f"Resumed from {saved.folder} at step {saved.step}.")

    def _report(self, record: dict[str, Any]) -> None:
        self._notify(lambda callback: callback.on_step(self, record))
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

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM stops the run at the step's edge; a second SIGINT stops it at once."""

        def stop(number: int, _frame: Any) -> None:
            self._stop = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._tell(f"{signal.Signals(number).name}: a checkpoint follows this step; Ctrl-C again ends at once.")

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def open_stream(recipe: Recipe, data_rank: int, data_ranks: int) -> TrainStream:
    """The recipe's data for one rank; shards are checked first. Raises UserError for what is missing or damaged."""
    data = recipe.data
    return TrainStream(
        [Path(stream.path) for stream in data.streams],
        batch=recipe.train.batch,
        data_rank=data_rank,
        data_ranks=data_ranks,
        seed=recipe.train.seed,
        shuffle=data.shuffle,
        workers=data.workers,
        resolution=data.resolution,
    )


def train(recipe: Recipe, runs: Path, callbacks: list[Callback]) -> int:
    """Trains `recipe` in `runs/NAME`, from its newest checkpoint if it has one. Returns the exit code.

    Raises UserError for bad input, before the first step.
    """
    run = Run(runs / recipe.run)
    try:
        place = start_topology(recipe)
        with together(place, run.log_file(place.rank), _explain):
            return Trainer(recipe, run, callbacks, place).fit()
    finally:
        topology.stop()


def _explain(error: BaseException) -> tuple[str, int] | None:
    """Message and exit code of an error that is not a crash."""
    if isinstance(error, UserError):
        return str(error), BAD_INPUT
    return ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else None
