"""Intervals of what a study finds, over what might have been otherwise: the training seeds and the items judged.

Runs of all variants with one seed meet the same samples, noise and times, and all are judged by the same items:
held-out pictures, or prompts. So both are resampled together for all variants: a resample draws seeds and,
independently, items, each with replacement, and a difference of two variants is made within it (the two-way bootstrap
for crossed designs of Owen 2007, whose intervals are rather too wide than too narrow). With one seed there is nothing
to draw, and an interval tells of the items alone.

Shapes: `N` resamples, `R` seeds, `P` items, `V` values of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95
Z = 1.959964  # of the normal density, for LEVEL


@dataclass(frozen=True)
class Estimate:
    """A number and its interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is on that side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def within(self, low: float, high: float) -> "Estimate":
        """Widened to another interval."""
        return Estimate(self.value, min(self.low, low), max(self.high, high))


class Resamples:
    """Weights that say how often a resample has each seed and each item; the same whenever they are asked for."""

    def __init__(self, seeds: int, strata: Sequence[int], count: int = RESAMPLES):
        """strata: numbers of items, each drawn among themselves (a task's prompts, say)."""
        rng = np.random.default_rng(0)
        draw = [rng.multinomial(size, np.full(size, 1 / size), count) / size for size in (seeds, *strata)]
        self._seeds, self._strata = draw[0], draw[1:]  # (N, R), (N, P) each
        self._sizes = list(strata)

    def means(self, values: np.ndarray) -> list[np.ndarray]:
        """values (R, V, P), all strata's items one after the other -> for each stratum the resampled means (N, V)."""
        parts = np.split(values, np.cumsum(self._sizes)[:-1], axis=-1)
        return [
            np.einsum("nr,rvn->nv", self._seeds, part @ weights.T)
            for part, weights in zip(parts, self._strata, strict=True)
        ]


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    """With the percentile interval of the resampled values (N,), some of which may be infinite."""
    ordered = np.sort(resampled)
    tail = (1 - LEVEL) / 2 * (len(ordered) - 1)
    return Estimate(value, float(ordered[int(np.floor(tail))]), float(ordered[int(np.ceil(len(ordered) - 1 - tail))]))


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's interval of a share; unlike a bootstrap's it has a width where all items agree."""
    share, spread = right / count, Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * np.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def share(right: np.ndarray) -> Estimate:
    """Of right answers (R, P): bootstrap over seeds and prompts, no narrower than Wilson's over the prompts."""
    (resampled,) = Resamples(right.shape[0], [right.shape[1]]).means(right[:, None].astype(float))
    value = float(right.mean())
    return estimate(value, resampled[:, 0]).within(*wilson(value * right.shape[1], right.shape[1]))
