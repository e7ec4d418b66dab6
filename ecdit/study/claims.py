"""The paper's claims, and what becomes of each in a study: it holds, it does not, or the study cannot tell.

Source: Sun et al. 2024 (arXiv 2410.02098). Numbers of theirs are of models of billions of parameters and photographs;
only the directions are expected here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from ecdit.study.compare import Findings, find
from ecdit.study.intervals import Estimate
from ecdit.study.plan import StudyPlan
from ecdit.study.read import RunResult

Results = dict[str, list[RunResult]]  # by variant
HOLDS, NOT, UNKNOWN, MISSING = "holds here", "does not hold here", "not resolved", "not measured"


@dataclass(frozen=True)
class Claim:
    """What the paper says, what was measured of it, and what follows: see the constants above."""

    text: str
    paper: str
    measured: str
    estimate: Estimate | None
    verdict: str


def judge(found: Estimate | None, *, better: int, neutral: float = 0.0) -> str:
    """better: 1 where the claim predicts more than `neutral`, -1 where less. The whole interval has to be there."""
    if found is None:
        return MISSING
    moved = Estimate(found.value - neutral, found.low - neutral, found.high - neutral)
    return {better: HOLDS, 0: UNKNOWN, -better: NOT}[moved.sign]


def claims(results: Results, plan: StudyPlan) -> list[Claim]:
    """In the order of the paper's argument."""
    first, most = plan.expert_choice[0], plan.expert_choice[-1]
    made = []
    for ours, theirs, paper in _pairs(
        (first, plan.reference, "about half the steps (Figure 8)"),
        (most, plan.reference, "more experts help (Figures 5, 7)"),
    ):
        text = f"{ours} does, too" if made else f"{ours} has {theirs}'s last loss in fewer steps"
        made.append(_ratio(text, paper, _against(results, ours, theirs, lambda found: found.steps_ratio)))
    more = [(b, a, "more experts help (Figures 5, 7)") for a, b in pairwise(plan.expert_choice)]
    for ours, theirs, paper in _pairs(
        (first, plan.equal_compute, "lower, at similar activated parameters"),
        (first, plan.token_choice, "lower than conventional mixtures of experts"),
        *more,
    ):
        found = _against(results, ours, theirs, lambda found: found.loss_difference)
        made.append(_difference(f"{ours} has a lower loss than {theirs}", paper, found, "held-out loss, {}", better=-1))
    told = "better alignment (GenEval, Table 4)"
    for ours, theirs, paper in _pairs(
        (first, plan.reference, told),
        (first, plan.equal_compute, told),
        (first, plan.token_choice, told),
        (most, first, told),
    ):
        found = _against(results, ours, theirs, lambda found: found.overall_difference)
        made.append(
            _difference(f"{ours} draws more of what is asked for than {theirs}", paper, found, "score, {}", better=1)
        )
    return made


def _pairs(*asked: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """(ours, theirs, what the paper says): each pair once, none of a variant and itself. A plan may have one variant in
    several places."""
    papers: dict[tuple[str, str], str] = {}
    for ours, theirs, paper in asked:
        if ours != theirs:
            papers.setdefault((ours, theirs), paper)
    return [(*pair, paper) for pair, paper in papers.items()]


def _against(results: Results, ours: str, theirs: str, value: Callable[[Findings], Estimate | None]) -> Estimate | None:
    mine, others = results.get(ours, []), results.get(theirs, [])
    return value(find(mine, others)) if mine and others else None


def _ratio(text: str, paper: str, found: Estimate | None) -> Claim:
    told = "" if found is None else f"{interval(found, '{:.2f}')} of its steps"
    return Claim(text, paper, told, found, judge(found, better=-1, neutral=1.0))


def _difference(text: str, paper: str, found: Estimate | None, told: str, *, better: int) -> Claim:
    form = "{:+.1%}" if better > 0 else "{:+.4f}"
    measured = "" if found is None else told.format(interval(found, form))
    return Claim(text, paper, measured, found, judge(found, better=better))


def interval(found: Estimate | None, form: str = "{:.4g}") -> str:
    """`value [low, high]`; what is infinite is a loss that was not reached."""
    if found is None:
        return ""
    value, low, high = ("not reached" if abs(x) == float("inf") else form.format(x) for x in vars(found).values())
    return value if value == low == high == "not reached" else f"{value} [{low}, {high}]"
