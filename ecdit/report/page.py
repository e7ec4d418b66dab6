"""The page: sections of tables and charts, in one file that opens without a network."""

from html import escape
from pathlib import Path

import numpy as np

from ecdit.evaluate.paper import figures, told
from ecdit.report import html
from ecdit.report.curves import Curve, average, equal_loss, window_of
from ecdit.report.figures import embed, embed_png, fid_against_clip, loss_curves, scores_over_steps, throughput
from ecdit.report.read import RunData, read_runs
from ecdit.report.scores import over_training, suites, table

# keys that change what a loss means, so that losses under other values are no fair comparison
LOSS_KEYS = ("data.", "diffusion.", "masking.", "model.side", "model.channels", "model.patch", "model.decoder.")
ANALYSES = ("allocation", "heterogeneity", "specialisation", "overlap")
SAME_IN_ALL = ("tasks", "categories", "score", "dsg", "clip_score", "accuracy")
MOST_PICTURES, MOST_STEPS = 48, 8


def write_report(folders: list[Path], out: Path) -> None:
    """Raises UserError for folders that are no runs or have logged nothing."""
    runs = read_runs(folders)
    curves = [average(run, window_of(runs)) for run in runs]
    sections = [
        ("runs", "Runs", _overview(runs, curves)),
        ("loss", "Loss", _loss(runs, curves)),
        ("scores", "Scores", _scores(runs)),
        ("training", "Over training", _over_training(runs)),
        ("samples", "Samples from the same seeds", _samples(runs)),
        ("experts", "Where the experts worked", _experts(runs)),
        ("speed", "Throughput and memory", _speed(runs)),
        ("recipes", "What the recipes differ in", _recipes(runs)),
    ]
    title = " · ".join(run.name for run in runs)
    html.write_page(title, ["ecdit", "report", *map(str, folders)], sections, out)


def _overview(runs: list[RunData], curves: list[Curve]) -> str:
    rows = []
    for run, curve in zip(runs, curves, strict=True):
        recipe = run.recipe
        sparse = recipe["model.routing"] != "dense"
        model = f"{recipe['model.layers']} layers, width {recipe['model.width']}"
        routing = recipe["model.routing"] + (f", {recipe['model.experts']} experts" if sparse else "")
        steps = f"{int(run.steps[-1]):,} of {recipe['train.steps']:,}"
        rows.append([run.name, model, routing, steps, f"{recipe['train.batch']:,}", html.number(curve.end)])
    return html.table(["run", "model", "routing", "steps", "batch", "loss at the end"], rows)


def _loss(runs: list[RunData], curves: list[Curve]) -> str:
    window = window_of(runs)
    chart = html.image(embed(loss_curves(runs, curves)), "loss over steps", "chart")
    text = html.note(f"Each point is the mean over the {window:,.0f} steps before it; what was logged is faint.")
    if len(runs) == 1:
        return chart + text
    unlike = sorted(key for key in _differing(runs) if key.startswith(LOSS_KEYS))
    if unlike:
        text += html.note(f"These losses are not of the same task: the runs differ in {', '.join(unlike)}.")
    rows = [
        [a.name, html.number(curve.end), *(_steps(step, curve.step_of(curve.end)) for step in steps)]
        for a, curve, steps in zip(runs, curves, equal_loss(curves), strict=True)
    ]
    heads = ["to reach the end of", "its loss", *(f"{run.name} needs" for run in runs)]
    return (
        chart
        + text
        + "<p>The first step at which a run has the loss of another's end, over that one's own.</p>"
        + html.table(heads, rows)
    )


def _steps(step: float | None, of: float | None) -> str:
    return "not reached" if step is None or of is None else f"{step:,.0f} ({step / of:.2f}x)"


def _scores(runs: list[RunData]) -> str:
    parts = []
    figure = fid_against_clip(runs)
    if figure is not None:
        parts.append(html.figure(html.image(embed(figure), "FID against CLIP", "chart"), "FID against CLIP, by step."))
    for suite in suites(runs):
        headings, rows = table(runs, suite)
        if not rows:
            continue
        paper = figures(suite)
        cells = [[_label(name), *map(html.number, numbers)] for name, numbers in rows.items()]
        if paper:
            headings.append("paper")
            for row in cells:
                row.append(paper[row[0]].value if row[0] in paper else "")
        parts.append(f"<h3>{escape(suite)}</h3>")
        parts.append(html.table([suite, *headings], cells))
        parts.append(html.note(told(suite)) if told(suite) else "")
    return "".join(parts) or html.note("No run has scores yet; <code>ecdit evaluate RUN</code> makes them.", html=True)


def _label(name: str) -> str:
    """A number's dotted name without what is the same in all rows of a suite."""
    telling = [part for part in name.split(".") if part not in SAME_IN_ALL]
    return " ".join(telling) or name


def _over_training(runs: list[RunData]) -> str:
    numbers = over_training(runs)
    parts = [html.image(embed(scores_over_steps(runs, numbers)), "scores over steps", "chart")] if numbers else []
    for run in runs:
        steps = sorted({step for of_step in run.drawn.values() for step in of_step})
        shown = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).astype(int))]
        rows = [
            [escape(prompt), *(_drawn_at(run, prompt, step, of_step) for step in shown)]
            for prompt, of_step in run.drawn.items()
        ]
        if rows:
            parts.append(html.table([run.name, *(f"step {step:,}" for step in shown)], rows, html=True))
    told = "Nothing was evaluated while it trained; <code>evaluation.every</code> of the recipe asks for it."
    return "".join(parts) or html.note(told, html=True)


def _drawn_at(run: RunData, prompt: str, step: int, of_step: dict[int, Path]) -> str:
    return (
        html.image(embed_png(of_step[step]), f"{run.name}: {prompt}, step {step}", "sample") if step in of_step else ""
    )


def _samples(runs: list[RunData]) -> str:
    shared = [key for key in runs[0].pictures if all(key in run.pictures for run in runs)]
    if not shared:
        return html.note(
            "No picture of the same prompt and seed in every run; <code>ecdit sample RUN</code> with the same "
            "<code>--prompt</code> and <code>--seed</code> for each draws them.",
            html=True,
        )
    rows = []
    for prompt in dict.fromkeys(prompt for prompt, _ in shared[:MOST_PICTURES]):
        keys = [key for key in shared[:MOST_PICTURES] if key[0] == prompt]
        rows.append([escape(prompt), *(_strip(run, keys) for run in runs)])
    unlike = {str(run.pictures[key].comparable) for run in runs for key in shared}
    text = (
        html.note("Not all were drawn with the same settings; each picture tells its own.") if len(unlike) > 1 else ""
    )
    if len(shared) > MOST_PICTURES:
        text += html.note(f"The first {MOST_PICTURES} of {len(shared)}.")
    return html.table(["prompt", *(run.name for run in runs)], rows, html=True) + text


def _strip(run: RunData, keys: list[tuple[str, int]]) -> str:
    """A run's pictures of one prompt, by seed; seed and settings are told where the mouse rests."""
    images = []
    for prompt, seed in keys:
        picture = run.pictures[prompt, seed]
        told = ", ".join(f"{key} {value}" for key, value in {"seed": seed, **picture.settings}.items())
        images.append(html.image(embed_png(picture.path), f"{run.name}: {prompt}, {told}", "sample"))
    return f'<div class="strip">{"".join(images)}</div>'


def _experts(runs: list[RunData]) -> str:
    parts = []
    for run in runs:
        analyses = [run.folder / "analysis" / f"{name}.png" for name in ANALYSES]
        # `ecdit analyze` draws what `ecdit sample --heatmap` draws, and more
        files = analyses if analyses[0].exists() else [run.folder / "heatmap.png", *analyses]
        found = [path for path in files if path.exists()]
        if found:
            parts.append(f"<h3>{escape(run.name)}</h3>")
        for path in found:
            name = path.relative_to(run.folder)
            parts.append(html.figure(html.image(embed_png(path), f"{run.name}: {path.stem}"), escape(str(name))))
    return "".join(parts) or html.note("No run was analysed; <code>ecdit analyze RUN</code> does it.", html=True)


def _speed(runs: list[RunData]) -> str:
    rows = []
    for run in runs:
        metrics = run.metrics
        seconds, memory = metrics.get("seconds", np.array([np.nan])), metrics.get("memory", np.array([np.nan]))
        rows.append(
            [
                run.name,
                html.number(_median(metrics.get("images_per_s"))),
                html.number(_median(seconds)),
                html.number(float(np.nanquantile(seconds, 0.95)) if np.isfinite(seconds).any() else None),
                html.percent(_median(metrics.get("mfu"))),
                html.number(float(np.nanmax(memory)) / 2**30 if np.isfinite(memory).any() else None),
            ]
        )
    heads = ["run", "images/s", "step, s", "95% of steps within, s", "MFU", "peak memory of a rank, GiB"]
    chart = html.image(embed(throughput(runs)), "throughput and memory", "chart")
    return html.table(heads, rows) + html.note("Medians over the logged steps.") + chart


def _recipes(runs: list[RunData]) -> str:
    keys = sorted(_differing(runs) - {"run"})
    if len(runs) == 1 or not keys:
        return html.note("Nothing." if len(runs) > 1 else "There is one run.")
    return html.table(
        ["key", *(run.name for run in runs)], [[key, *(_value(run.recipe.get(key)) for run in runs)] for key in keys]
    )


def _differing(runs: list[RunData]) -> set[str]:
    keys = {key for run in runs for key in run.recipe}
    return {key for key in keys if any(run.recipe.get(key) != runs[0].recipe.get(key) for run in runs)}


def _median(values: np.ndarray | None) -> float | None:
    return None if values is None or not np.isfinite(values).any() else float(np.nanmedian(values))


def _value(value: object) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."
