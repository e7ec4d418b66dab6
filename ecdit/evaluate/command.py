"""`ecdit evaluate` as it is typed. What it runs is imported when it runs, so that other commands start quickly."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ecdit.run import Run
from ecdit.terminal import Json, Overrides, RunFolder, Step, join_job


def evaluate(
    run: RunFolder,
    overrides: Overrides = None,
    suite: Annotated[
        str, typer.Option(help="Which: samples, shapes, fid, clip, geneval, dsg, parti; several with commas.")
    ] = "shapes",
    n: Annotated[
        int | None,
        typer.Option("-n", min=1, help="Pictures of each task (shapes: 50) or prompt (fid, clip, dsg: 1; else 4)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and noise.")] = 0,
    prompts: Annotated[Path | None, typer.Option(help="fid, clip: captions, one a line.")] = None,
    reference: Annotated[Path | None, typer.Option(help="fid: folder of the real pictures.")] = None,
    inception: Annotated[Path | None, typer.Option(help="fid: inception-2015-12-05.pt (TorchScript).")] = None,
    clip: Annotated[str | None, typer.Option(help="clip, parti: a CLIP's folder or hub name.")] = None,
    metadata: Annotated[Path | None, typer.Option(help="geneval: its evaluation_metadata.jsonl.")] = None,
    geneval: Annotated[Path | None, typer.Option(help="geneval: its repository, whose scorer is run.")] = None,
    geneval_python: Annotated[str | None, typer.Option(help="geneval: python of its environment.")] = None,
    detector: Annotated[Path | None, typer.Option(help="geneval: folder of the Mask2Former.")] = None,
    questions: Annotated[Path | None, typer.Option(help="dsg: dsg-1k-anns.csv.")] = None,
    vqa: Annotated[
        str | None, typer.Option(help="dsg: address of an OpenAI-compatible server, or a model's folder or hub name.")
    ] = None,
    vqa_model: Annotated[str | None, typer.Option(help="dsg: name of the server's model.")] = None,
    parti: Annotated[Path | None, typer.Option(help="parti: PartiPrompts.tsv.")] = None,
    step: Step = None,
    as_json: Json = False,
) -> None:
    """Score pictures drawn from the averaged weights; also writes evaluate-SUITE.json into the run.

    With --step it is evaluate-SUITE-step-N.json, and `ecdit report` draws scores over steps.

    Overrides and ranks are those of `ecdit sample`; so is what is drawn: pictures that are there are not drawn again.
    """
    join_job()
    from ecdit.evaluate.held import place_of, release
    from ecdit.evaluate.paper import told
    from ecdit.evaluate.suite import Options
    from ecdit.evaluate.suites import SUITES, as_table, names_of
    from ecdit.evaluate.suites import evaluate as run_suites

    options = Options(
        place_of(Run(run), step), n, seed, prompts, reference, inception, clip, metadata, geneval, geneval_python,
        detector, questions, vqa, vqa_model, parti,
    )  # fmt: skip
    names = names_of(suite)
    try:
        found = run_suites(Run(run), names, options, overrides or (), step)
    finally:
        if step is not None and os.environ.get("RANK", "0") == "0":
            release(Run(run), step)
    if as_json and found:
        print(json.dumps(found[names[0]] if len(names) == 1 else found, indent=1))
    stdout = Console()
    for name, scores in found.items() if not as_json else ():
        stdout.print(as_table(name, scores, SUITES[name].rows(scores)))
        stdout.print(f" {told(name)}\n", soft_wrap=True, highlight=False)
