"""The page of a study: what was found, with figures, and how it was measured. It needs no model."""

import json
import shlex
from dataclasses import asdict
from html import escape
from pathlib import Path

from ecdit.report import html
from ecdit.report.figures import as_svg, embed
from ecdit.study import figures
from ecdit.study.claims import HOLDS, NOT, Claim, Results, claims, interval
from ecdit.study.compare import Findings, as_json, find
from ecdit.study.intervals import Estimate
from ecdit.study.machine import machine
from ecdit.study.plan import Ablation, Study
from ecdit.study.publish import publish as publish_to
from ecdit.study.read import Judged, results_of
from ecdit.study.thumbnails import heatmap, right_or_wrong

PICTURES = 2  # of a task, side by side
MARKS = {HOLDS: "#1a7f37", NOT: "#cf222e"}


def write(study: Study, publish: Path | None = None) -> list[str]:
    """index.html, study.json, loss.png and loss.svg in the study's folder, from the runs that are there, and a copy
    with the runs' logs in `publish`. What to tell the user."""
    results = read(study)
    compared = {name: [run for run in runs if run.is_compared] for name, runs in results.items()}
    compared = {name: runs for name, runs in compared.items() if runs}
    study.folder.mkdir(parents=True, exist_ok=True)
    page, told = study.folder / "index.html", []
    missing = [run for runs in results.values() for run in runs if not run.is_compared]
    if missing:
        told.append("Missing: " + ", ".join(f"{run.run.name} ({run.state})" for run in missing))
    found = {name: find(runs, compared.get(study.plan.reference, [])) for name, runs in compared.items()}
    made = claims(compared, study.plan)
    _write_page(study, results, compared, found, made, page)
    record = {
        "study": study.plan.name,
        "step": study.runs[0].recipe.train.steps,
        "batch": study.runs[0].recipe.train.batch,
        "machine": machine(),
        "claims": [asdict(claim) for claim in made],
        "variants": {name: asdict(one) for name, one in found.items()},
        "ablations": [_ablation_record(ablation, compared) for ablation in study.plan.ablations],
        "missing": {run.run.name: run.state for run in missing},
    }
    text = json.dumps(as_json(record), indent=1, allow_nan=False)
    (study.folder / "study.json").write_text(text + "\n", encoding="utf-8")
    if compared:
        main = {name: runs for name, runs in compared.items() if name in study.plan.main} or compared
        chart = figures.losses(main, found, study.plan.reference)
        chart.savefig(study.folder / "loss.png", dpi=110)
        (study.folder / "loss.svg").write_bytes(as_svg(chart))
    told.append(f"{sum(map(len, compared.values()))} runs compared: {page}")
    if publish is not None:
        told.append(publish_to(study, results, publish))
    return told


def read(study: Study) -> Results:
    """All runs that are wanted, and those of other variants and seeds that are there. Raises UserError where one was
    trained on other terms, by another command perhaps that ended meanwhile."""
    found: Results = {}
    for result in results_of(study):
        if result.run in study.runs or result.is_compared:
            result.check()
            found.setdefault(result.run.variant, []).append(result)
    return found


def _write_page(
    study: Study, results: Results, compared: Results, found: dict[str, Findings], made: list[Claim], out: Path
) -> None:
    main = {name: runs for name, runs in compared.items() if name in study.plan.main}
    of_main = {name: found[name] for name in main}
    scored = {name: one for name, one in of_main.items() if one.overall is not None}
    sections = [("found", "What was found", _claims(made) if compared else html.note("No run is done yet."))]
    if main:
        sections += [
            ("loss", "Loss", _loss(main, of_main, study)),
            ("scores", "Scores", _scores(scored, study)),
            ("samples", "The same prompts and seeds", _samples(main)),
            ("routing", "Tokens that no expert works on", _routing(main, of_main)),
            ("heatmaps", "Where the experts worked", _heatmaps(main)),
        ]
    if study.plan.ablations:
        sections.append(("ablations", "Ablations", "".join(_ablation(a, compared) for a in study.plan.ablations)))
    sections += [
        ("models", "The models", _models(found, study)),
        ("runs", "The runs", _runs(results)),
        ("method", "How it was measured", _method(study)),
    ]
    html.write_page(f"{study.plan.name}: does expert choice win?", _command(study), sections, out)


def _command(study: Study) -> list[str]:
    return ["ecdit", "study", str(study.source), *study.overrides, "--seeds", ",".join(map(str, study.seeds))]


# ------------------------------------------------------------------------------------------------------------- sections


def _claims(made: list[Claim]) -> str:
    rows = [
        [
            escape(claim.text),
            escape(claim.paper),
            escape(claim.measured),
            f'<b style="color:{MARKS.get(claim.verdict, "#57606a")}">{claim.verdict}</b>',
        ]
        for claim in made
    ]
    return html.table(["claim", "paper", "measured", "so"], rows, html=True, kind="text") + html.note(
        "The paper's words are of other models and data, and its numbers are not to be met here. A claim holds, or "
        "does not, where the whole interval is on that side."
    )


def _loss(main: Results, found: dict[str, Findings], study: Study) -> str:
    reference = study.plan.reference
    chart = html.image(embed(figures.losses(main, found, reference)), "held-out loss", "chart")
    rows = [
        [
            escape(name),
            str(len(one.seeds)),
            _cell(one.loss, "{:.4f}"),
            "" if name == reference else _cell(one.loss_difference, "{:+.4f}"),
            "1" if name == reference else _cell(one.steps_ratio, "{:.2f}"),
            "1" if name == reference else _cell(one.seconds_ratio, "{:.2f}"),
            f"{one.seconds_a_step * study.runs[0].recipe.train.steps / 60:.1f}",
        ]
        for name, one in found.items()
    ]
    heads = [
        "variant",
        "seeds",
        "held-out loss",
        f"less {reference}'s",
        "steps to its loss",
        "time to its loss",
        "minutes",
    ]
    differences = ""
    if len(found) > 1 and reference in found:
        differences = html.image(embed(figures.differences(found, reference)), "differences", "chart")
    return (
        chart
        + html.note(f"Averaged weights, on pictures that are not trained on. Dotted: the last loss of {reference}.")
        + html.table(heads, rows, html=True)
        + html.note(f"Steps and time to the last loss of {reference}, over its own. Minutes of training alone.")
        + differences
    )


def _scores(found: dict[str, Findings], study: Study) -> str:
    if not found:
        return html.note("No run is scored yet.")
    tasks = list(next(iter(found.values())).scores)
    rows = [
        [
            escape(name),
            _cell(one.overall, "{:.1%}"),
            "" if name == study.plan.reference else _cell(one.overall_difference, "{:+.1%}"),
            *(_cell(one.scores[task], "{:.0%}") for task in tasks),
        ]
        for name, one in found.items()
    ]
    heads = ["variant", "overall", f"less {study.plan.reference}'s", *(task.replace("_", " ") for task in tasks)]
    return (
        html.image(embed(figures.scores(found)), "scores", "chart")
        + html.table(heads, rows, html=True)
        + html.note("Overall is the mean of the six tasks that GenEval has too, all but digits.")
    )


def _samples(main: Results) -> str:
    first = {name: runs[0].judged for name, runs in main.items() if runs[0].judged}
    if not first:
        return html.note("No run is scored yet.")
    judged = next(iter(first.values()))
    shown: list[int] = []
    for task in dict.fromkeys(one.task for one in judged):
        shown += [i for i, one in enumerate(judged) if one.task == task][:PICTURES]
    rows = [[escape(judged[i].prompt), *(_picture(name, of[i]) for name, of in first.items())] for i in shown]
    return html.table(["prompt", *first], rows, html=True) + html.note(
        "The first prompts of each task, none chosen; green where the picture shows what was asked for."
    )


def _picture(name: str, judged: Judged) -> str:
    uri = right_or_wrong(judged.path, right=judged.right)
    return html.image(uri, f"{name}: {judged.prompt}, {'right' if judged.right else 'wrong'}", "small")


def _routing(main: Results, found: dict[str, Findings]) -> str:
    figure = figures.unrouted(main)
    if figure is None:
        return html.note("No variant here has experts.")
    rows = [
        [name, html.percent(one.unrouted), html.percent(one.dropped)]
        for name, one in found.items()
        if one.unrouted is not None
    ]
    return (
        html.image(embed(figure), "tokens that no expert works on", "chart")
        + html.table(["variant", "tokens that no expert took", "choices dropped"], rows)
        + html.note(
            "At the end of training, mean of the layers. Under expert choice such tokens are left out by choice; under "
            "token choice, where every token has two, they are those whose choices were both over capacity."
        )
    )


def _heatmaps(main: Results) -> str:
    parts = [
        html.figure(html.image(heatmap(run.analysis / "allocation.png"), f"{name}: experts per token"), escape(name))
        for name, (run, *_) in main.items()
        if run.analysis
    ]
    return "".join(parts) or html.note("No run is analysed yet.")


def _against_default(ablation: Ablation, compared: Results) -> dict[str, Findings]:
    default = compared.get(ablation.default, [])
    named = [ablation.default, *ablation.variants]
    return {name: find(compared[name], default) for name in named if name in compared}


def _ablation(ablation: Ablation, compared: Results) -> str:
    title = f"<h3>{escape(ablation.question)}</h3>"
    found = _against_default(ablation, compared)
    if len(found) < 2:
        return title + html.note("Not run yet.")
    rows = [
        [
            escape(name),
            _cell(one.loss, "{:.4f}"),
            *(
                ["", "1", _cell(one.overall, "{:.1%}"), ""]
                if name == ablation.default
                else [
                    _cell(one.loss_difference, "{:+.4f}"),
                    _cell(one.steps_ratio, "{:.2f}"),
                    _cell(one.overall, "{:.1%}"),
                    _cell(one.overall_difference, "{:+.1%}"),
                ]
            ),
            f"{one.flops / found[ablation.default].flops:.2f}" if ablation.default in found else "",
        ]
        for name, one in found.items()
    ]
    heads = ["variant", "held-out loss", "less the default's", "steps to its loss", "score", "less the default's"]
    return title + html.table([*heads, "operations"], rows, html=True)


def _ablation_record(ablation: Ablation, compared: Results) -> dict:
    found = _against_default(ablation, compared)
    return {"question": ablation.question, "variants": {name: asdict(one) for name, one in found.items()}}


def _cell(found: Estimate | None, form: str) -> str:
    """The value, and its interval under it."""
    value, _, rest = interval(found, form).partition(" [")
    return f"{escape(value)}<br><small>{escape(rest.removesuffix(']'))}</small>" if rest else escape(value)


def _models(found: dict[str, Findings], study: Study) -> str:
    base = found.get(study.plan.reference)
    rows = [
        [
            escape(name),
            f"{one.parameters / 1e6:.1f}",
            f"{one.activated / 1e6:.1f}",
            f"{one.flops / 1e9:.3g}",
            f"{one.flops / base.flops:.3f}" if base else "",
            html.number(one.seconds_a_step),
            f"{one.images_per_s:,.0f}",
            html.percent(one.mfu),
        ]
        for name, one in found.items()
    ]
    heads = [
        "variant",
        "parameters, M",
        "activated, M",
        "GFLOP an image",
        "over the reference",
        "s a step",
        "images/s",
        "MFU",
    ]
    return html.table(heads, rows) + html.note(f"Forward operations of matrix products. Machine: {machine()}.")


def _runs(results: Results) -> str:
    return html.table(["run", "state"], [[run.run.name, run.state] for runs in results.values() for run in runs])


def _method(study: Study) -> str:
    recipe, held = study.runs[0].recipe, study.runs[0].recipe.log.held_out
    many = len(study.seeds) > 1
    seeds = "training seeds and, independently, over " if many else ""
    alone = "" if many else " With one seed they do not tell how much another seed would change."
    return "".join(
        f"<p>{escape(text)}</p>"
        for text in (
            f"Every variant is trained for {recipe.train.steps:,} steps of {recipe.train.batch} pictures on the same "
            "samples in the same order, with the same noise and times, which are functions of the seed and the step. "
            "The learning rate is constant after the warm-up; what is judged is the average of the weights.",
            f"The held-out loss is of {held.pictures:,} pictures of {held.path}, with noise and times of their own, "
            "the same for all runs at all times.",
            f"Scores are of {study.plan.pictures} pictures a task, each of a prompt of its own, the same prompts and "
            "seeds for all, judged by exact detectors.",
            f"Intervals hold 95%: a bootstrap over {seeds}the pictures or prompts, the same resamples for both sides "
            f"of a difference; a share's is no narrower than Wilson's.{alone}",
            f"To repeat it: {shlex.join(_command(study))}",
        )
    )
