"""The charts of a report, as SVG in data URIs: a page needs nothing beside itself."""

import base64
import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ecdit.report.curves import Curve, thin
from ecdit.report.read import RunData
from ecdit.report.scores import fid_and_clip


def color(number: int) -> str:
    """Of a run, by its place on the command line, in every chart."""
    return f"C{number % 10}"


def embed(figure: Figure) -> str:
    """A data URI."""
    return data_uri("image/svg+xml", as_svg(figure))


def as_svg(figure: Figure) -> bytes:
    """A file that needs no fonts."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "ecdit"}):  # the same figure, the same bytes
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def embed_png(path: Path) -> str:
    """A data URI."""
    return data_uri("image/png", path.read_bytes())


def loss_curves(runs: list[RunData], curves: list[Curve]) -> Figure:
    """Logged losses, faint; averaged ones; and the first run's loss at its end with where the others meet it."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        axes.plot(*thin(run.steps, run.metrics["loss"]), color=color(number), alpha=0.2, lw=0.8)
        axes.plot(*thin(curve.steps, curve.losses), color=color(number), lw=1.8, label=run.name)
    end = curves[0].end
    if len(runs) > 1 and np.isfinite(end):
        axes.axhline(end, color=color(0), ls=":", lw=1)
        for number, curve in enumerate(curves):
            step = curve.step_of(end)
            if step is not None:
                axes.plot([step], [end], "o", color=color(number), ms=6)
    lows = np.concatenate([curve.losses for curve in curves])
    lows = lows[np.isfinite(lows)]
    if lows.size:
        axes.set_ylim(max(0.0, lows.min() * 0.9), np.quantile(lows, 0.99) * 1.1)
    finish(axes, "step", "loss")
    return figure


def throughput(runs: list[RunData]) -> Figure:
    """Images a second and memory over the steps."""
    figure = Figure(figsize=(9, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        for axes, key, unit in ((left, "images_per_s", 1), (right, "memory", 2**30)):
            if key in run.metrics:
                known = np.isfinite(run.metrics[key])
                steps, values = thin(run.steps[known], run.metrics[key][known] / unit, 300)
                axes.plot(steps, values, color=color(number), lw=1.2, label=run.name)
    finish(left, "step", "images/s")
    finish(right, "step", "peak memory of a rank, GiB")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
    return figure


def fid_against_clip(runs: list[RunData]) -> Figure | None:
    """A line a run, a point a scored step; None where no run has both scores."""
    lines = [(number, run, fid_and_clip(run)) for number, run in enumerate(runs)]
    if not any(points for _, _, points in lines):
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for number, run, points in lines:
        if points:
            steps, fid, clip = zip(*points, strict=True)
            axes.plot(clip, fid, "o-", color=color(number), label=run.name)
            for step, x, y in zip(steps, clip, fid, strict=True):
                axes.annotate(f"{step:,}", (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7)
    finish(axes, "CLIP score (higher is better)", "FID (lower is better)")
    return figure


def scores_over_steps(runs: list[RunData], numbers: dict[str, list[list[tuple[int, float]]]]) -> Figure:
    """A panel a number, a line a run."""
    columns = min(3, len(numbers))
    rows = -(-len(numbers) // columns)
    figure = Figure(figsize=(3 * columns + 1, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, of_runs) in zip(panels, numbers.items(), strict=False):
        for number, (run, points) in enumerate(zip(runs, of_runs, strict=True)):
            if points:
                axes.plot(*zip(*points, strict=True), "o-", ms=4, color=color(number), label=run.name)
        finish(axes, "step", name)
    for axes in panels[len(numbers) :]:
        axes.remove()
    return figure


def finish(axes, x: str, y: str) -> None:
    """Labels, a light grid, no frame, and a legend where lines have names."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def data_uri(kind: str, data: bytes) -> str:
    """kind: a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
