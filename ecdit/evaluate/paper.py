"""What the paper reports, beside which a suite's table prints ours. Only figures that its text prints are here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """value: as it is printed; of which model; where it stands."""

    value: str
    model: str
    source: str


FIGURES = {
    ("geneval", "overall"): Figure("71.68%", "EC-DiT-M-64E", "arXiv 2410.02098, abstract"),
}
