"""The pictures of a study: allocation over layers and times, what experts prefer, which of them overlap.

Shapes: `V` times, `E` experts, `W` words, `l` MoE layers.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ecdit.analyze.heatmap import write_heatmap
from ecdit.analyze.study import Study
from ecdit.evaluate.paper import LARGEST_SHARE

MOST_LAYERS = 6  # shown of a deep model, evenly spaced
MOST_WORDS = 24
AROUND_ONE = matplotlib.colormaps["RdBu_r"].with_extremes(bad="lightgrey")  # what is not known is not white, which is 1


def write_study(study: Study, folder: Path) -> list[Path]:
    """allocation.png, heterogeneity.png, specialisation.png, overlap.png, analysis.json and analysis.npz."""
    folder.mkdir(parents=True, exist_ok=True)
    write_heatmap(study.samples, folder / "allocation.png", study.layers)
    for name, draw in (
        ("heterogeneity", heterogeneity),
        ("specialisation", specialisation),
        ("overlap", overlap),
    ):
        draw(study).savefig(folder / f"{name}.png", dpi=110)
    (folder / "analysis.json").write_text(json.dumps(study.record(), indent=1, allow_nan=False) + "\n", "utf-8")
    np.savez_compressed(folder / "analysis.npz", **study.arrays())
    return sorted(folder.iterdir())


def heterogeneity(study: Study) -> Figure:
    """Over time, a line a layer: experts per token (mean and spread), tokens left out, the most that one token got."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    found, times = study.heterogeneity(), study.samples.times
    for i in _shown(len(study.layers)):
        label = f"layer {study.layers[i]}"
        mean, std = found["mean"][:, i], found["std"][:, i]
        (line,) = left.plot(times, mean, label=label)
        left.fill_between(times, np.maximum(mean - std, 0), mean + std, color=line.get_color(), alpha=0.15, lw=0)
        middle.plot(times, 100 * found["unrouted"][:, i], label=label)
        right.plot(times, 100 * found["largest"][:, i], label=label)
    left.set_title("experts per token, mean and spread", fontsize=9)
    middle.set_title("tokens that no expert took, %", fontsize=9)
    right.set_title("most that one token got, % of the experts", fontsize=9)
    for axes in (left, middle, right):
        axes.set_xlabel("t (0: noise, 1: picture)", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    right.axhline(100 * LARGEST_SHARE, color="grey", ls="--", lw=1, label="the paper, at most")
    right.set_ylim(0, 105)
    right.legend(handles=right.lines[-1:], fontsize=7)
    left.legend(fontsize=7)
    return figure


def specialisation(study: Study) -> Figure:
    """A row a layer: when each expert takes part, over its mean; and which words its tokens read, over the average."""
    rows = _shown(len(study.layers))
    words = _telling(study)
    figure = Figure(figsize=(12, 0.9 + 2.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    for row, i in enumerate(rows):
        profile, reading = study.time_profile[:, i].T, study.reading[i][:, words]  # (E, V), (E, W)
        when = axes[row][0].imshow(profile, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        shown = np.linspace(0, len(study.samples.times) - 1, 5).round().astype(int)
        axes[row][0].set_xticks(shown, [f"{study.samples.times[v]:.2f}" for v in shown], fontsize=7)
        axes[row][0].set_ylabel(f"layer {study.layers[i]}\nexpert", fontsize=8)
        which = axes[row][1].imshow(reading, aspect="auto", cmap=AROUND_ONE, norm=_around_one(reading))
        labels = [study.words[w] for w in words]
        axes[row][1].set_xticks(range(len(words)), labels, rotation=60, ha="right", fontsize=7, parse_math=False)
        figure.colorbar(when, ax=axes[row][0])
        figure.colorbar(which, ax=axes[row][1])
    axes[-1][0].set_xlabel("t (0: noise, 1: picture)", fontsize=8)
    axes[0][0].set_title("weight with which the expert takes part at t, over its mean", fontsize=9)
    axes[0][1].set_title("attention to the word of the tokens it takes, over the average token's", fontsize=9)
    return figure


def overlap(study: Study) -> Figure:
    """A panel a layer: how often two experts took the same token, over chance."""
    shown, lift = _shown(len(study.layers)), study.lift
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    norm = _around_one(lift)
    for cell, i in zip(axes.flat, shown, strict=False):
        last = cell.imshow(lift[i], cmap=AROUND_ONE, norm=norm)
        cell.set_title(f"layer {study.layers[i]}", fontsize=9)
        cell.set_xlabel("expert", fontsize=8)
        cell.set_ylabel("expert", fontsize=8)
    for cell in axes.flat[len(shown) :]:
        cell.set_visible(False)
    figure.colorbar(last, ax=axes, shrink=0.7).set_label("tokens that both took, over chance", fontsize=8)
    return figure


def _shown(layers: int) -> list[int]:
    return np.unique(np.linspace(0, layers - 1, min(layers, MOST_LAYERS)).round().astype(int)).tolist()


def _telling(study: Study) -> list[int]:
    """The words on which experts differ most, in the order of the prompts."""
    known = np.nan_to_num(study.reading, nan=1.0)
    spread = known.std(axis=1).max(axis=0)  # (W,)
    return sorted(np.argsort(-spread, kind="stable")[:MOST_WORDS].tolist())


def _around_one(values: np.ndarray) -> TwoSlopeNorm:
    known = values[~np.isnan(values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (1.0, 1.0)
    return TwoSlopeNorm(1.0, min(low, 0.99), max(high, 1.01))
