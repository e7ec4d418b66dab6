"""What a study finds of each variant: its losses, steps and scores, with their intervals.

Shapes: `R` seeds, `V` evaluations of the held-out loss, `P` held-out pictures, `N` resamples.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ecdit.diffusion.masking import keep_count
from ecdit.evaluate.shapes import GENEVAL
from ecdit.model.count import count_parameters, forward_flops
from ecdit.report.curves import Curve
from ecdit.study.intervals import Estimate, Resamples, estimate, share
from ecdit.study.read import RunResult


@dataclass
class Findings:
    """Of one variant, at the study's step. None: it is not known. Differences and ratios are to the reference, over the
    seeds that both have.

    loss: held-out. steps_ratio: steps for the reference's last loss over the reference's steps; inf: not reached; and
    seconds_ratio, the same in time. scores: by task. flops: of an image's forward pass in training.
    """

    name: str
    seeds: list[int]
    parameters: int
    activated: int
    flops: int
    seconds_a_step: float
    loss: Estimate | None = None
    loss_difference: Estimate | None = None
    steps_ratio: Estimate | None = None
    seconds_ratio: Estimate | None = None
    scores: dict[str, Estimate] = field(default_factory=dict)
    overall: Estimate | None = None
    overall_difference: Estimate | None = None
    unrouted: float | None = None
    dropped: float | None = None
    images_per_s: float = float("nan")
    mfu: float = float("nan")


def find(runs: list[RunResult], reference: list[RunResult]) -> Findings:
    """Of one variant's runs; reference: those of the reference variant. There is at least one run."""
    recipe = runs[0].run.recipe
    compared = [run for run in runs if run.is_compared]
    count = count_parameters("", recipe.model)
    seconds = _seconds_a_step(compared or runs)
    found = Findings(
        name=runs[0].run.variant,
        seeds=[run.run.seed for run in compared],
        parameters=count.total - count.encoders,
        activated=count.activated - count.encoders,
        flops=forward_flops(recipe.model, keep_count(recipe.model.tokens, recipe.masking.schedule[-1][1])),
        seconds_a_step=seconds,
        images_per_s=recipe.train.batch / seconds,
        mfu=float(np.median([run.median("mfu") for run in compared or runs])),
    )
    if compared:
        found.loss = _loss(compared)
        _routing(found, compared)
    _against(found, compared, [run for run in reference if run.is_compared])
    _scores(found, runs, reference)
    return found


def _seconds_a_step(runs: list[RunResult]) -> float:
    """Median over all logged steps: what slows a machine for a while, a save or another job, plays no part."""
    return float(np.median([run.median("seconds") for run in runs]))


def _stack(runs: list[RunResult]) -> tuple[np.ndarray, np.ndarray]:
    """Steps (V,) that all have, and losses (R, V, P)."""
    steps = sorted(set.intersection(*(set(run.held_out[0].tolist()) for run in runs)))
    return np.array(steps), np.stack([run.held_out[1][np.isin(run.held_out[0], steps)] for run in runs])


def _loss(runs: list[RunResult]) -> Estimate:
    last = _stack(runs)[1][:, -1:]
    (resampled,) = Resamples(len(runs), [last.shape[-1]]).means(last)
    return estimate(float(last.mean()), resampled[:, 0])


def _pairs(runs: list[RunResult], others: list[RunResult]) -> tuple[list[RunResult], list[RunResult]]:
    """Of the seeds that both have, in their order."""
    theirs = {run.run.seed: run for run in others}
    both = [run for run in runs if run.run.seed in theirs]
    return both, [theirs[run.run.seed] for run in both]


def _against(found: Findings, runs: list[RunResult], reference: list[RunResult]) -> None:
    ours, theirs = _pairs(runs, reference)
    if not ours:
        return
    steps, losses = _stack([*ours, *theirs])
    mine, base = losses[: len(ours)], losses[len(ours) :]
    draws = Resamples(len(ours), [losses.shape[-1]])
    (mine_n,), (base_n,) = draws.means(mine), draws.means(base)  # (N, V)
    mean, base_mean = mine.mean((0, 2)), base.mean((0, 2))
    found.loss_difference = estimate(float(mean[-1] - base_mean[-1]), mine_n[:, -1] - base_n[:, -1])
    ratio = _steps_ratio(steps, mean, base_mean[-1])
    found.steps_ratio = estimate(
        ratio, np.array([_steps_ratio(steps, m, b[-1]) for m, b in zip(mine_n, base_n, strict=True)])
    )
    slower = _seconds_a_step(ours) / _seconds_a_step(theirs)
    found.seconds_ratio = Estimate(*(slower * value for value in asdict(found.steps_ratio).values()))


def _steps_ratio(steps: np.ndarray, losses: np.ndarray, wanted: float) -> float:
    """The first step with the wanted loss, over the last step; inf where there is none."""
    step = Curve(steps.astype(float), losses).step_of(wanted)
    return np.inf if step is None else step / float(steps[-1])


def _right(run: RunResult) -> dict[str, np.ndarray]:
    """By task, in the suite's order."""
    tasks = dict.fromkeys(judged.task for judged in run.judged)
    return {task: np.array([j.right for j in run.judged if j.task == task]) for task in tasks}


def _scores(found: Findings, runs: list[RunResult], reference: list[RunResult]) -> None:
    scored = [run for run in runs if run.judged]
    if not scored:
        return
    right = [_right(run) for run in scored]
    found.scores = {task: share(np.stack([one[task] for one in right])) for task in right[0]}
    value, resampled = _overall(scored)
    found.overall = estimate(value, resampled)
    ours, theirs = _pairs(scored, [run for run in reference if run.judged])
    if ours:
        (value, resampled), (base, base_resampled) = _overall(ours), _overall(theirs)
        found.overall_difference = estimate(value - base, resampled - base_resampled)


def _overall(runs: list[RunResult]) -> tuple[float, np.ndarray]:
    """Mean of GenEval's six tasks, and the same of the resamples (N,)."""
    right = [_right(run) for run in runs]
    tasks = [np.stack([one[task] for one in right]).astype(float) for task in GENEVAL]  # (R, n) each
    resampled = Resamples(len(runs), [task.shape[1] for task in tasks]).means(np.concatenate(tasks, axis=1)[:, None])
    return float(np.mean([task.mean() for task in tasks])), np.mean([part[:, 0] for part in resampled], axis=0)


def _routing(found: Findings, runs: list[RunResult]) -> None:
    """Mean over the layers and the last tenth of the logged steps."""
    routing = runs[0].run.recipe.model.routing
    if routing == "dense":
        return

    def late(key: str) -> float:
        values = [run.layers(key)[1] for run in runs]
        return float(np.mean([part[-max(1, len(part) // 10) :].mean() for part in values if len(part)]))

    found.unrouted = late("unrouted_share")
    if routing == "token_choice":
        found.dropped = 1 - late("experts_per_token") / 2  # of a token's two choices


def as_json(value: Any) -> Any:
    """Plain values; what is not finite becomes null, for JSON has no other word for it."""
    if isinstance(value, dict):
        return {key: as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
