"""What the commands share: the terminal that they talk to, and arguments that mean the same in all of them."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ecdit.errors import UserError
from parallel.job import JobError, adopt_slurm

console = Console(stderr=True, highlight=False, soft_wrap=True)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, such as recipes/quickstart.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys to change.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/quickstart.")]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder that holds the run folders.")]
Step = Annotated[int | None, typer.Option(min=0, help="Of the checkpoint; the newest if not given.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def check_file(out: Path) -> None:
    """Makes the folder of a file that is to be written. Raises UserError where there can be no such file."""
    if out.is_dir():
        raise UserError(f"--out: {out}: is a folder; valid: the name of a file, such as {out}/NAME")
    check_folder(out.parent)


def check_folder(out: Path, option: str = "--out") -> None:
    """Makes a folder that is to be written into. Raises UserError where there can be none."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{option}: {out}: a file is in the way; valid: a folder, or a name that is free") from None


def number(count: int, thing: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def join_job() -> None:
    """Takes this process's place in the job of srun, where that started it. Raises UserError where it cannot."""
    try:
        adopt_slurm()
    except JobError as error:
        raise UserError(str(error)) from None
