"""Checkpoints of a training run: what is saved with the weights, and how the run goes on from them, or begins."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ecdit.errors import UserError
from ecdit.evaluate.held import held
from ecdit.init_from import fill_state, open_source
from ecdit.recipe import Recipe
from ecdit.recipe_io import dump_recipe
from ecdit.run import Run, check_same_model
from parallel.checkpoint import CheckpointError
from parallel.checkpoint.folder import Checkpoint, Keep, committed
from parallel.checkpoint.store import CheckpointStore
from parallel.engine import Engine
from parallel.topology import Topology


@dataclass
class Progress:
    """Where a run stands: finished steps, applied updates, and skipped ones in all and in a row."""

    step: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


class Saves:
    """Where a run's checkpoints come from and go to. All ranks call it alike."""

    def __init__(self, recipe: Recipe, run: Run, place: Topology, tell: Callable[[str], None]):
        """Raises UserError where `init_from` is asked for and its checkpoint cannot be."""
        self._recipe, self._run, self._place, self._tell = recipe, run, place, tell
        # looked at before anything else is loaded; a run that has begun goes on without it
        self._source = open_source(recipe) if recipe.init_from and not committed(run.checkpoints) else None
        keep = recipe.checkpoint.keep
        self._store = CheckpointStore(
            run.checkpoints,
            place,
            Keep(keep.last, keep.every, partial(held, run)),
            asynchronous=recipe.checkpoint.asynchronous,
            timeout_minutes=recipe.parallel.timeout_minutes,
        )

    # ------------------------------------------------------------------------------------------------ where it begins

    def resume(self, engine: Engine) -> Progress:
        """Fills the engine's state from the newest checkpoint that verifies, or as a run begins; where it then stands.

        Raises UserError where what is there is another model's, or does not fit into memory.
        """
        try:
            self._store.check_memory(engine.state())
            saved, messages = self._store.newest()
        except CheckpointError as error:
            raise UserError(str(error)) from None
        for message in messages:
            self._tell(message)
        return self._begin(engine) if saved is None else self._go_on(engine, saved)

    def _go_on(self, engine: Engine, saved: Checkpoint) -> Progress:
        changes = check_same_model(self._recipe, saved)
        state = engine.state()
        # scales of FP8 are found anew in a few steps, so a run may begin with FP8 in its middle
        missing = [name for name in state if name.startswith("fp8/") and name not in saved.names]
        if missing:
            self._tell(f"{saved.folder} has no scales of FP8 for {len(missing)} tensors; they begin anew.")
        saved.load({name: boxes for name, boxes in state.items() if name not in missing})
        engine.loaded(saved.meta["updates"])
        self._tell(f"Resumed from {saved.folder} at step {saved.step}.")
        for change in changes:
            self._tell(change)
        return Progress(saved.step, saved.meta["updates"], saved.meta["skipped"])

    def _begin(self, engine: Engine) -> Progress:
        """The first step's weights: those of the seed, or of `init_from`."""
        if not self._recipe.init_from:
            return Progress()
        source = self._source or open_source(self._recipe)  # the checkpoints there were may all be broken
        source.check(self._place.rank, self._place.ranks)
        for message in fill_state(self._recipe, source, engine.state()):
            self._tell(message)
        updates = source.updates_for(self._recipe)
        engine.loaded(updates)
        return Progress(updates=updates)

    # ------------------------------------------------------------------------------------------------- what it leaves

    def save(self, engine: Engine, progress: Progress) -> None:
        """Begins to write a checkpoint."""
        meta = {
            "updates": progress.updates,
            "skipped": progress.skipped,
            "samples": progress.step * self._recipe.train.batch,
            "optimizer": self._recipe.optimizer.name,
            "recipe": dump_recipe(self._recipe),
        }
        self._store.wait()
        self.tell_of_failed()
        self._store.save(progress.step, engine.state(), meta)

    def save_and_wait(self, engine: Engine, progress: Progress) -> None:
        """The last one of this process. Raises UserError where it could not be written."""
        self.save(engine, progress)
        self._store.wait()
        saved = self._store.ended()
        if saved is not None and saved.error is not None:
            raise UserError(f"{saved.error}; {self._kept()}. Make room and type the same command again.")

    def tell_of_failed(self) -> None:
        """A save that failed does not end the run: there is a later one."""
        saved = self._store.ended()
        if saved is not None and saved.error is not None:
            self._tell(f"{saved.error}; {self._kept()}. The run goes on and tries again at the next checkpoint.")

    def wait(self) -> None:
        """Until nothing is being written."""
        self._store.wait()

    def _kept(self) -> str:
        kept = committed(self._run.checkpoints)
        return f"{kept[-1].name} is kept" if kept else "there is none before it"
