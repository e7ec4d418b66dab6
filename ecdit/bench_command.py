"""`ecdit bench`: runs a benchmark, prints its table, writes its rows as JSON."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ecdit.terminal import Overrides, join_job

WIDTH_OF_FILES = 220
NAMES = "moe, block, step, dispatch, sample, kernels, checkpoint, plan, engines, data"


def bench(
    name: Annotated[str, typer.Argument(help=f"One of {NAMES}.")],
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="What `step` trains.")] = None,
    overrides: Overrides = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Of timing, building and warming up besides.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the solver, for `sample`.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Also write a Chrome trace of the first variant here (.json or .json.gz).")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Variants to measure, by a pattern of their names such as '*FP8*'; more than once for more."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Run a benchmark against its peers, all in one run. Under torchrun or srun all ranks take part."""
    join_job()
    from benchmarks import as_table, check, report
    from benchmarks.budget import Asked, check_place

    asked = Asked(seconds, steps, profile, recipe, tuple(overrides or ()), tuple(only or ()))
    check(name, asked)
    if json_file is not None:
        check_place("--json", json_file)
    try:
        result = report(name, asked)
    finally:
        from parallel import topology

        topology.stop()
    if int(os.environ.get("RANK", 0)):
        return
    terminal = Console()
    width = terminal.width if terminal.is_terminal else max(terminal.width, WIDTH_OF_FILES)
    Console(width=width).print(as_table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
