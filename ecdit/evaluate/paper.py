"""What the paper reports, beside which a suite's table prints ours: its figures, or why there is none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """value: as it is printed; of which model; where it stands."""

    value: str
    model: str
    source: str


LARGEST = "EC-DiT-M-64E"
LARGEST_SHARE = 0.44  # of a layer's experts, that one token got (Section 3.5, on Figure 6)

# by suite and the key of the table's row
FIGURES = {
    ("geneval", "overall"): Figure("71.68%", LARGEST, "arXiv 2410.02098, abstract"),
}
WHY_NONE = {
    "dsg": "Table 3, by another judge's answers, no number at hand",
    "shapes": "none, the suite is of this project",
    "fid": "a curve of FID against CLIP score (Figure 7), no number at hand",
    "clip": "a curve of FID against CLIP score (Figure 7), no number at hand",
    "parti": "pictures, the best of four by CLIP score, no number",
}


def figures(suite: str) -> dict[str, Figure]:
    """Those of a suite, by the key of the row."""
    return {key: figure for (name, key), figure in FIGURES.items() if name == suite}


def told(suite: str) -> str:
    """Where the figures beside a suite's scores are from, or why there are none; empty where nothing is scored."""
    found = figures(suite).values()
    sources = [f"{figure.model}, {figure.source}" for figure in found] or [WHY_NONE.get(suite, "")]
    text = "; ".join(dict.fromkeys(sources))
    return f"paper: {text}" if text else ""
