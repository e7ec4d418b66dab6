"""Loss curves, and how many steps one run needs for the loss that another has at its end (the paper's Figure 8).

Shapes: `R` logged steps.
"""

from dataclasses import dataclass

import numpy as np

from ecdit.report.read import RunData

WINDOW = 0.05  # of the shortest run: steps that a loss is averaged over, for a step's loss depends on its few samples


@dataclass(frozen=True)
class Curve:
    """Losses averaged over the steps before each, (R,) both; the first window is left out."""

    steps: np.ndarray
    losses: np.ndarray

    @property
    def end(self) -> float:
        """The loss at the run's end."""
        return float(self.losses[-1])

    def step_of(self, loss: float) -> float | None:
        """The first step whose averaged loss is no more than that, between logged steps by a line; None: no step."""
        below = np.flatnonzero(self.losses <= loss)
        if not len(below):
            return None
        at = int(below[0])
        if at == 0:
            return float(self.steps[0])
        part = (self.losses[at - 1] - loss) / (self.losses[at - 1] - self.losses[at])
        return float(self.steps[at - 1] + part * (self.steps[at] - self.steps[at - 1]))


def window_of(runs: list[RunData]) -> float:
    """Steps to average over, the same for all, so that no run is smoother than another."""
    return max(1.0, WINDOW * min(float(run.steps[-1]) for run in runs))


def average(run: RunData, window: float) -> Curve:
    """Mean over the logged steps within (step - window, step]; steps without a finite loss are left out."""
    finite = np.isfinite(run.metrics["loss"])
    steps, losses = run.steps[finite], run.metrics["loss"][finite]
    if not len(steps):
        return Curve(run.steps[-1:], np.array([np.nan]))
    total = np.concatenate([[0.0], np.cumsum(losses)])
    first = np.searchsorted(steps, steps - window, side="right")
    mean = (total[1:] - total[first]) / (np.arange(len(steps)) + 1 - first)
    full = steps >= min(steps[0] - 1 + window, steps[-1])
    return Curve(steps[full], mean[full])


def equal_loss(curves: list[Curve]) -> list[list[float | None]]:
    """[a][b]: the step at which run b has the loss that run a has at its end."""
    return [[b.step_of(a.end) for b in curves] for a in curves]


def thin(steps: np.ndarray, values: np.ndarray, most: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, each the mean of its share, for a page need not hold 800,000."""
    if len(steps) <= most:
        return steps, values
    cuts = np.linspace(0, len(steps), most + 1).astype(int)[:-1]
    count = np.diff(np.append(cuts, len(steps)))
    return np.add.reduceat(steps, cuts) / count, np.add.reduceat(values, cuts) / count
