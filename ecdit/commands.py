"""The commands that look at runs, or take something out of them: evaluate, analyze, report, export, serve."""

from pathlib import Path
from typing import Annotated

import typer

from ecdit.errors import UserError
from ecdit.evaluate.command import evaluate
from ecdit.run import Run
from ecdit.terminal import RunFolder, check_file, check_folder, console, number


def register(app: typer.Typer) -> None:
    """Adds them to the `ecdit` command."""
    app.command()(evaluate)
    app.command()(analyze)
    app.command()(report)
    app.command()(export)
    app.command()(serve)


def analyze(
    run: RunFolder,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeat it for more.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of a prompt's first picture; the next has one more.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver, which is Euler here.")] = None,
) -> None:
    """Show where a run's experts work, on what, when, and how they overlap: pictures and data in RUN/analysis."""
    from ecdit.analyze.figures import write_study
    from ecdit.analyze.study import study
    from ecdit.evaluate.paper import LARGEST_SHARE
    from ecdit.sampling import sample_settings

    place = Run(run)
    recipe = place.recipe()
    settings = sample_settings(recipe, steps=steps)
    with console.status("Drawing, and watching the experts"):
        found = study(place, prompt or recipe.log.prompts, n, seed, settings)
        write_study(found, run / "analysis")
    uneven = found.heterogeneity()
    console.print(
        f"{uneven['unrouted'].mean():.1%} of the tokens were taken by no expert; the busiest one by "
        f"{uneven['largest'].max():.0%} of a layer's experts (the paper: up to {LARGEST_SHARE:.0%}). "
        f"Pictures and data: {run / 'analysis'}",
        markup=False,
    )


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, the one to beat first.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Compare runs on one HTML page: losses, scores, samples, experts, throughput."""
    from ecdit.report.page import write_report

    check_file(out)
    write_report(runs, out)
    console.print(f"{number(len(runs), 'run')} in {out}", markup=False)


def export(
    run: RunFolder,
    to: Annotated[
        str, typer.Option(help="Form: safetensors, one file; diffusers, a pipeline's folder.")
    ] = "safetensors",
    weights: Annotated[str, typer.Option(help="ema (the averaged weights) or weights (the trained ones).")] = "ema",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    out: Annotated[
        Path | None, typer.Option(help="File or folder; RUN/WEIGHTS.safetensors or RUN/diffusers if not given.")
    ] = None,
) -> None:
    """Write the weights of a run's newest checkpoint for use elsewhere."""
    from ecdit.export.weights import KINDS, checkpoint_of, write_file

    forms, types = ("safetensors", "diffusers"), ("fp32", "bf16")
    for option, value, valid in (("--to", to, forms), ("--weights", weights, KINDS), ("--dtype", dtype, types)):
        if value not in valid:
            raise UserError(f"{option}: {value!r} is not known; valid: {', '.join(valid)}")
    if to == "diffusers":
        from ecdit.export.diffusers_folder import write_pipeline

        place = out or run / "diffusers"
        if out is not None:
            check_folder(out.parent)
        step = write_pipeline(Run(run), weights, dtype, place)
    else:
        place = out or run / f"{weights}.safetensors"
        saved = checkpoint_of(Run(run))
        check_file(place)
        write_file(saved, weights, dtype, place)
        step = saved.step
    console.print(f"{weights} of step {step} in {place}", markup=False)


def serve(
    run: RunFolder,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
) -> None:
    """Serve a page that draws what is typed, step by step, and shows where the experts work. Ctrl-C ends it."""
    from ecdit.serve import serve as run_server

    run_server(run, host, port)
