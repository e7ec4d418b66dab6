"""A grid of fixed prompts every so often, from the averaged weights."""

from typing import TYPE_CHECKING, Any

from ecdit.callbacks import Callback
from ecdit.pictures import grid
from ecdit.sampling import Sampler, Samples

if TYPE_CHECKING:
    from ecdit.train import Trainer

COLUMNS = 4


class PictureGrid(Callback):
    """`samples/step-N.png`: each prompt of `log.prompts` a row, the same seeds every time."""

    every_rank = True  # each has a part of the model

    def on_step(self, trainer: "Trainer", record: dict[str, Any]) -> None:
        every = trainer.recipe.log.grid_every
        if not every or record["step"] % every:
            return
        with trainer.engine.averaged() as model:
            samples = self._draw(
                trainer, Sampler(model, trainer.recipe, trainer.inputs.text_encoder, trainer.inputs.autoencoder)
            )
        if trainer.topology.first:
            trainer.run.samples.mkdir(parents=True, exist_ok=True)
            file = trainer.run.samples / f"step-{trainer.progress.step}.png"
            grid(samples.images, trainer.recipe.log.prompts, COLUMNS).save(file)

    def _draw(self, trainer: "Trainer", sampler: Sampler) -> Samples:
        prompts = trainer.recipe.log.prompts
        return sampler.draw(
            [prompt for prompt in prompts for _ in range(COLUMNS)],
            list(range(COLUMNS)) * len(prompts),
            trainer.recipe.sample,
        )
