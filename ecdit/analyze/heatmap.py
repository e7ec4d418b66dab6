"""Where the compute went: experts per token, per layer and per time, over the picture (the paper's Figure 6).

Shapes: `V` times, `N` pictures, `S` tokens of an image.
"""

import textwrap
import warnings
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ecdit.sampling import Samples

COLUMNS = 6  # times shown
PICTURES = COLUMNS // 2  # each with its mean beside it
CELL = 1.25  # inches


def write_heatmap(samples: Samples, path: Path, sparse_layers: list[int]) -> None:
    """One PNG: for each picture its mean over layers and times, then every layer at several times for the first.

    `sparse_layers` numbers the MoE layers among the blocks, counted from 1.
    """
    shown = np.linspace(0, len(samples.times) - 1, COLUMNS).round().astype(int)
    layers, pictures = len(sparse_layers), min(len(samples.images), PICTURES)
    figure = Figure(figsize=((COLUMNS + 1) * CELL, (layers + 2.2) * CELL), layout="constrained")
    axes = figure.subplots(layers + 1, COLUMNS, squeeze=False)
    highest = float(samples.experts.float().mean((0, 1)).max()) or 1.0
    for n in range(PICTURES):
        picture, heat = axes[0][2 * n], axes[0][2 * n + 1]
        if n < pictures:
            picture.imshow(samples.images[n].numpy())
            picture.set_title(_wrap(samples.prompts[n]), fontsize=7, parse_math=False)  # a $ is a dollar
            _overlay(heat, samples.images[n], samples.experts[:, :, n].float().mean((0, 1)), highest)
            heat.set_title("mean experts\nper token", fontsize=7)
    most = int(samples.experts[:, :, 0].max())
    for row, layer in enumerate(sparse_layers, start=1):
        for column, v in enumerate(shown):
            cell = axes[row][column]
            last = _overlay(cell, samples.images[0], samples.experts[v, row - 1, 0].float(), most)
            if row == 1:
                cell.set_title(f"t = {samples.times[v]:.2f}", fontsize=8)
            if column == 0:
                cell.set_ylabel(f"layer {layer}", fontsize=8)
    for cell in axes.flat:
        cell.set_xticks([])
        cell.set_yticks([])
        cell.spines[:].set_visible(False)
    bar = figure.colorbar(last, ax=axes[1:], shrink=0.6, ticks=range(most + 1))
    bar.set_label("experts that took the token, first picture", fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that the font lacks: there is a box for it
        figure.savefig(path, dpi=110)


def _overlay(cell, image: Tensor, counts: Tensor, highest: float):
    """The counts (S,) of one picture, in colours over its grey version."""
    side = round(counts.numel() ** 0.5)
    pixels = image.shape[0]
    grey = image.float().mean(-1).numpy()
    extent = (0, pixels, pixels, 0)
    cell.imshow(grey, cmap="gray", vmin=-128, vmax=255, extent=extent)
    return cell.imshow(counts.view(side, side).numpy(), cmap="inferno", vmin=0, vmax=highest, alpha=0.7, extent=extent)


def _wrap(text: str) -> str:
    """In a few lines, as wide as a picture, cut off where it is longer."""
    return "\n".join(textwrap.wrap(text, 22, max_lines=3, placeholder="…"))
