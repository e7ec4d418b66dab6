"""The `ecdit` command. Each subcommand reads its input, calls one function, and says what came of it.

Exit codes: 0 done, 1 a run that cannot go on, 2 bad input, 75 stopped with a checkpoint and wants to go on.
"""

import errno
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ecdit import bench_command
from ecdit import commands as run_commands
from ecdit.data import commands as data_commands
from ecdit.errors import UserError
from ecdit.recipe_io import load_recipe
from ecdit.run import Run
from ecdit.stop import StopRequest
from ecdit.terminal import Json, Overrides, RecipeFile, RunFolder, RunsFolder, Step, console, join_job
from launcher import commands as cluster_commands
from parallel.job import under_srun

SECONDS_UNDER_SRUN = 30  # that the first task may wait for an evaluation: srun ends it 60 after the others

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__.splitlines()[0], rich_markup_mode=None)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    runs: RunsFolder = Path("runs"),
) -> None:
    """Train a recipe in runs/NAME; the same command resumes. Ctrl-C saves and exits with 75."""
    stop = StopRequest().listen()
    join_job()
    loaded = load_recipe(recipe, overrides or ())
    from ecdit.callbacks.grid import PictureGrid
    from ecdit.callbacks.metrics import JsonLines, TensorBoard, Wandb
    from ecdit.callbacks.progress import ProgressBar
    from ecdit.train import DONE, STOPPED
    from ecdit.train import train as run_training

    callbacks = [ProgressBar(), JsonLines(), PictureGrid()]
    if loaded.log.held_out.path:
        from ecdit.callbacks.held_out import HeldOutLoss

        callbacks.append(HeldOutLoss())
    if loaded.log.tensorboard:
        callbacks.append(TensorBoard())
    if loaded.log.wandb is not None:
        callbacks.append(Wandb(loaded.log.wandb))
    if loaded.evaluation.every:
        from ecdit.callbacks.evaluation import Evaluation
        from launcher.evaluation import starter

        patience = SECONDS_UNDER_SRUN if under_srun() else None
        callbacks.append(Evaluation(loaded, Run(runs / loaded.run), starter(loaded), stop, patience))
    code = run_training(loaded, runs, callbacks, stop)
    # srun ends the other tasks when one exits with a code, and passes on none: there status.json says the rest
    raise typer.Exit(DONE if code == STOPPED and under_srun() else code)


@app.command()
def sample(
    run: RunFolder,
    overrides: Overrides = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeat it for more rows.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File: a prompt a line, or .jsonl with prompt and seed.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Pictures of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of a prompt's first picture; the next has one more.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")] = None,
    solver: Annotated[str | None, typer.Option(help="euler or heun.")] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the time grid.")] = None,
    heatmap: Annotated[bool, typer.Option("--heatmap", help="Also show where the experts worked.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; the run's own if not given.")] = None,
    step: Step = None,
) -> None:
    """Draw pictures from the averaged weights: PNGs, a grid (samples.png), and heatmap.png where asked for.

    Pictures that are there already are not drawn again. Under torchrun or srun the ranks share them; parallel.tensor=2
    and the like spread the model too.
    """
    join_job()
    from ecdit.sample_command import sample as run_sample

    settings = {"steps": steps, "guidance": guidance, "solver": solver, "shift": shift}
    run_sample(Run(run), overrides or (), prompt, prompts, n, seed, settings, out or run, step=step, heatmap=heatmap)


@app.command()
def params(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Models; all if none.")] = None,
    as_json: Json = False,
) -> None:
    """Count the parameters of the models of the paper's Table 1, beside what it prints."""
    from ecdit.analyze.table import NOTES, comparison, counts

    rows = counts(names or ())
    if as_json:
        print(json.dumps([vars(row) for row in rows], indent=1))
        return
    stdout = Console(width=max(Console().width, 112))  # narrower, the table would hide digits
    stdout.print(comparison(rows))
    stdout.print(NOTES, soft_wrap=True, markup=False, highlight=False)


checkpoint_app = typer.Typer(no_args_is_help=True, help="List and verify a run's checkpoints.")
app.add_typer(checkpoint_app, name="checkpoint")


@checkpoint_app.command("ls")
def checkpoint_ls(run: RunFolder, as_json: Json = False) -> None:
    """List a run's checkpoints: step, samples seen, size, files, folder."""
    from ecdit.analyze.checkpoints import as_table, listing

    rows = listing(Run(run))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        Console().print(as_table(rows))


@checkpoint_app.command("verify")
def checkpoint_verify(
    run: RunFolder,
    step: Annotated[int | None, typer.Option(help="This step's alone; all if not given.")] = None,
) -> None:
    """Read every file of a run's checkpoints and compare its checksum. Exit code 1 where one is broken."""
    from ecdit.analyze.checkpoints import verify_all

    broken = False
    for name, problems in verify_all(Run(run), step):
        broken = broken or bool(problems)
        print(f"{name}: {'; '.join(problems) or 'verified'}", flush=True)
    raise typer.Exit(int(broken))


app.command()(bench_command.bench)
data_commands.register(app)
run_commands.register(app)
cluster_commands.register(app)


def main() -> None:
    """Entry point: errors of the user's become one message and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # all ranks read the same files
            console.print(f"ecdit: {error}", markup=False)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        console.print(f"ecdit: {error.filename or 'a file'}: {error.strerror}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
