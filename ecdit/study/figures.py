"""The charts of a study.

Shapes: `V` evaluations of the held-out loss.
"""

from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ecdit.report.curves import Curve
from ecdit.report.figures import finish
from ecdit.study.compare import Findings
from ecdit.study.intervals import Estimate
from ecdit.study.read import RunResult

COLORS = matplotlib.color_sequences["tab10"]


def losses(results: dict[str, list[RunResult]], found: dict[str, Findings], reference: str) -> Figure:
    """Held-out loss over steps and over the time of training: a line a variant, its seeds faint, and the reference's
    last loss with where the others meet it."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    lows, starts = [], []
    for number, (name, runs) in enumerate(results.items()):
        color, seconds = COLORS[number % len(COLORS)], found[name].seconds_a_step / 60
        for axes, unit in ((left, 1.0), (right, seconds)):
            for run in runs if len(runs) > 1 else ():
                axes.plot(run.held_out[0] * unit, run.held_out[1].mean(1), color=color, lw=0.7, alpha=0.35)
            steps, mean = mean_curve(runs)
            axes.plot(steps * unit, mean, color=color, lw=1.8, label=name)
        lows.append(mean.min())
        starts.append(mean[min(len(mean) - 1, max(1, len(mean) // 8))])
    if reference in results:
        _mark(left, right, results, found, reference)
    if max(starts) > min(lows):
        left.set_ylim(min(lows) - 0.05 * (max(starts) - min(lows)), max(starts))
    finish(left, "step", "held-out loss")
    finish(right, "minutes of training", "")
    return figure


def _mark(left: Axes, right: Axes, results, found: dict[str, Findings], reference: str) -> None:
    wanted = mean_curve(results[reference])[1][-1]
    left.axhline(wanted, color="0.4", ls=":", lw=1)
    right.axhline(wanted, color="0.4", ls=":", lw=1)
    for number, (name, runs) in enumerate(results.items()):
        steps, mean = mean_curve(runs)
        step = Curve(steps.astype(float), mean).step_of(wanted)
        if step is not None:
            for axes, unit in ((left, 1.0), (right, found[name].seconds_a_step / 60)):
                axes.plot([step * unit], [wanted], "o", color=COLORS[number % len(COLORS)], ms=5)


def mean_curve(runs: list[RunResult]) -> tuple[np.ndarray, np.ndarray]:
    """Over the seeds, at the steps (V,) that all have."""
    steps = sorted(set.intersection(*(set(run.held_out[0].tolist()) for run in runs)))
    rows = [run.held_out[1][np.isin(run.held_out[0], steps)].mean(1) for run in runs]
    return np.array(steps), np.mean(rows, axis=0)


def scores(found: dict[str, Findings]) -> Figure:
    """A group a task, a bar a variant, with intervals."""
    tasks = [*next(iter(found.values())).scores, "overall"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(found)
    for number, (name, one) in enumerate(found.items()):
        shown = [one.overall if task == "overall" else one.scores[task] for task in tasks]
        places = np.arange(len(tasks)) + (number - (len(found) - 1) / 2) * width
        values = np.array([100 * e.value for e in shown])
        spread = [[100 * (e.value - e.low) for e in shown], [100 * (e.high - e.value) for e in shown]]
        axes.bar(places, values, width * 0.92, color=COLORS[number % len(COLORS)], label=name)
        axes.errorbar(places, values, np.maximum(spread, 0), fmt="none", ecolor="0.25", elinewidth=0.8)
    axes.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    finish(axes, "", "right, %")
    return figure


def differences(found: dict[str, Findings], reference: str) -> Figure:
    """What each variant has over the reference, with intervals: loss and overall score."""
    figure = Figure(figsize=(11, 0.9 + 0.36 * len(found)), layout="constrained")
    panels: list[tuple[Axes, str, Callable[[Findings], Estimate | None], float]] = [
        (axes, *what)
        for axes, what in zip(
            figure.subplots(1, 2, sharey=True),
            (
                ("held-out loss less the reference's", lambda one: one.loss_difference, 1.0),
                ("overall score less the reference's, points", lambda one: one.overall_difference, 100.0),
            ),
            strict=True,
        )
    ]
    names = [name for name in found if name != reference]
    for axes, label, value, unit in panels:
        axes.axvline(0, color="0.4", lw=1)
        for row, name in enumerate(names):
            one, color = value(found[name]), COLORS[list(found).index(name) % len(COLORS)]
            if one is not None:
                axes.plot([unit * one.low, unit * one.high], [row, row], color=color, lw=2)
                axes.plot([unit * one.value], [row], "o", color=color, ms=5)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        finish(axes, label, "")
    return figure


def unrouted(results: dict[str, list[RunResult]]) -> Figure | None:
    """Over the steps, mean over the layers: tokens that no expert took; under token choice also the dropped choices,
    dashed. None where nothing has experts."""
    figure = Figure(figsize=(11, 3.0), layout="constrained")
    axes, any_line = figure.subplots(), False
    for number, (name, runs) in enumerate(results.items()):
        steps, shares = runs[0].layers("unrouted_share")
        if not len(steps):
            continue
        any_line, color = True, COLORS[number % len(COLORS)]
        axes.plot(*_smooth(steps, 100 * shares.mean(1)), color=color, label=name)
        if runs[0].run.recipe.model.routing == "token_choice":
            steps, taken = runs[0].layers("experts_per_token")
            told = f"{name}, dropped choices"
            axes.plot(*_smooth(steps, 100 * (1 - taken.mean(1) / 2)), color=color, ls="--", label=told)
    axes.set_ylim(bottom=0)
    finish(axes, "step", "tokens, %")
    return figure if any_line else None


def _smooth(steps: np.ndarray, values: np.ndarray, most: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Means of equal parts."""
    parts = min(most, len(steps))
    cut = [np.array_split(x, parts) for x in (steps, values)]
    return tuple(np.array([part.mean() for part in one]) for one in cut)
