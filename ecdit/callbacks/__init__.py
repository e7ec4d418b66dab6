"""What is optional about a run: progress bar, metric files, picture grids. The loop knows only this interface."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecdit.train import Trainer


class Callback:
    """Does nothing; override what is needed. Called on the first rank alone, unless `every_rank` is set."""

    every_rank = False

    def check(self, trainer: "Trainer") -> None:
        """Before anything is written to the run's folder. Raises UserError for what it cannot do."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process, after a resume."""

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        """After every step. `record["logged"]` says whether the recipe asks for this step's line."""

    def on_message(self, message: str) -> None:
        """Something that the user should read."""

    def on_end(self, trainer: "Trainer") -> None:
        """After the last step of this process, also when it ends by an error."""
