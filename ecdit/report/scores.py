"""Scores of runs: tables of any suite (the paper's Tables 2 to 4), and FID against CLIP over training (Figure 7)."""

from ecdit.report.read import RunData, Scores

FID, CLIP = ("fid",), ("clip", "clip_score", "clipscore")


def newest(run: RunData, suite: str) -> Scores | None:
    """The run's last scores of a suite; those that tell no step are of its newest checkpoint."""
    found = [scores for scores in run.scores if scores.suite == suite]
    return max(found, key=lambda scores: float("inf") if scores.step is None else scores.step, default=None)


def suites(runs: list[RunData]) -> list[str]:
    """Of all runs, in the order met."""
    return list(dict.fromkeys(scores.suite for run in runs for scores in run.scores))


def table(runs: list[RunData], suite: str) -> tuple[list[str], dict[str, list[float | None]]]:
    """Headings, one a run that says its step, and for each number of the suite a row; None where a run lacks it."""
    found = [newest(run, suite) for run in runs]
    headings = [
        run.name if scores is None or scores.step is None else f"{run.name}, step {scores.step:,}"
        for run, scores in zip(runs, found, strict=True)
    ]
    names = dict.fromkeys(name for scores in found if scores for name in scores.numbers)
    return headings, {name: [scores.numbers.get(name) if scores else None for scores in found] for name in names}


def fid_and_clip(run: RunData) -> list[tuple[int, float, float]]:
    """(step, FID, CLIP) of every step at which the run has both, ascending. Scores without a step are of the last;
    other suites' CLIP scores, such as the best of four, are of other pictures."""
    last = int(run.steps[-1])
    fid: dict[int, float] = {}
    clip: dict[int, float] = {}
    for scores in run.scores:
        step = last if scores.step is None else scores.step
        for name, number in scores.numbers.items():
            word = name.rsplit(".", 1)[-1].lower()
            if scores.suite == "fid" and word in FID:
                fid[step] = number
            elif scores.suite == "clip" and word in CLIP:
                clip[step] = number
    return [(step, fid[step], clip[step]) for step in sorted(fid.keys() & clip.keys())]


def over_training(runs: list[RunData]) -> dict[str, list[list[tuple[int, float]]]]:
    """Of each suite's overall numbers, by "suite, name", the (step, number) points of each run, ascending; those alone
    that some run has at several steps."""
    last = [int(run.steps[-1]) for run in runs]
    found: dict[str, list[dict[int, float]]] = {}
    for number, run in enumerate(runs):
        for scores in sorted(run.scores, key=lambda scores: scores.step is None):
            for name in (name for name in scores.numbers if "." not in name):
                points = found.setdefault(f"{scores.suite}, {name}", [{} for _ in runs])[number]
                points.setdefault(last[number] if scores.step is None else scores.step, scores.numbers[name])
    lines = {name: [sorted(points.items()) for points in of_runs] for name, of_runs in found.items()}
    return {name: of_runs for name, of_runs in lines.items() if any(len(points) > 1 for points in of_runs)}
