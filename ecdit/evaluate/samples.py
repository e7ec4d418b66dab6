"""The fixed prompts of a run as a suite: pictures to look at, and no score."""

from pathlib import Path
from typing import Any

import torch

from ecdit.evaluate.suite import Judgement, Options, Row
from ecdit.pictures import grid, read_pixels
from ecdit.prompts import Request
from ecdit.recipe import Recipe


class SamplesSuite:
    """See `ecdit.evaluate.suite.Suite`. `n`: pictures of each of `log.prompts`, 4 if not given, and the seeds that
    `ecdit sample` gives them."""

    def __init__(self, options: Options, recipe: Recipe):
        self._prompts, self._n, self._seed = recipe.log.prompts, options.n or 4, options.seed
        self._grid = options.folder / "samples.png"

    def requests(self) -> list[Request]:
        """Prompt by prompt."""
        return [Request(prompt, self._seed + i) for prompt in self._prompts for i in range(self._n)]

    def load(self) -> None:
        """Nobody judges these."""

    def judge(self, pictures: list[Path]) -> Judgement:
        """Puts them on a grid."""
        images = torch.stack([read_pixels(path) for path in pictures])
        grid(images, self._prompts, self._n).save(self._grid)
        summary = {"suite": "samples", "grid": str(self._grid), "pictures": len(pictures)}
        return Judgement(summary, [{} for _ in pictures])

    @staticmethod
    def rows(scores: dict[str, Any]) -> list[Row]:
        """Where they are."""
        return [Row("grid", scores["grid"], str(scores["pictures"]))]
