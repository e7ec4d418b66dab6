"""The commands of the launcher. Each imports what it runs, so that the others start quickly."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ecdit.errors import UserError
from ecdit.recipe_io import load_recipe
from ecdit.terminal import Json, Overrides, RecipeFile, RunsFolder, check_folder, console


def register(app: typer.Typer) -> None:
    """Adds them to the `ecdit` command."""
    app.command()(launch)
    app.command()(doctor)
    app.command()(plan)
    app.command()(scale)
    app.command()(study)
    app.command()(supervise)
    app.command(hidden=True)(preflight)


def launch(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; the recipe's cluster.nodes if not given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch file and submit nothing.")] = False,
    render: Annotated[bool, typer.Option("--render", help="Write the batch file beside the recipe instead.")] = False,
    runs: RunsFolder = Path("runs"),
) -> None:
    """Submit a run's job to SLURM; the same command goes on with it, on more or fewer nodes if asked to."""
    from launcher import slurm
    from launcher.launch import batch_file, for_nodes
    from launcher.launch import launch as submit

    loaded, given, layout = for_nodes(recipe, list(overrides or ()), nodes)
    if layout:
        console.print(f"On {loaded.cluster.nodes} nodes it will train with {' '.join(layout)}", markup=False)
    if render:
        file = recipe.with_suffix(".slurm")
        file.write_text(slurm.render(loaded, str(recipe), tuple(given)), encoding="utf-8")
        console.print(f"{file}; submit it with: sbatch {file}", markup=False)
    elif dry_run:
        print(batch_file(recipe, loaded, given, runs), end="")
    else:
        number, run = submit(recipe, given, None, runs), runs / loaded.run
        console.print(
            f"Job {number}. Where it stands: {run / 'status.json'}; what it says: {run / 'logs'}", markup=False
        )


def doctor(
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option(help="Tell what this recipe needs of it; exit 2 if it lacks.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what this machine has and lacks, and what that costs. Exit code 1 where training cannot work here."""
    from launcher.doctor import as_table, cannot_train, examine, for_recipe, require

    if overrides and recipe is None:
        raise UserError(f"{overrides[0]}: there is no recipe to change; name it: --recipe RECIPE")
    loaded = load_recipe(recipe, overrides or ()) if recipe else None
    with console.status("Looking"):
        findings = examine()
    shown = for_recipe(findings, loaded) if loaded else findings
    if as_json:
        print(json.dumps([vars(one) for one in shown], indent=1))
    else:
        Console(width=max(Console().width, 100)).print(as_table(shown))
    if loaded:
        require(findings, loaded)
    raise typer.Exit(int(cannot_train(findings)))


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; the recipe's cluster.nodes if not given.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus-per-node", min=1, help="GPUs of a node.")] = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100, h200, b200, rtx4090, or a YAML file.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Rank all layouts that fit; takes a minute.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Layouts that --search lists.")] = 10,
    as_json: Json = False,
) -> None:
    """Tell memory, traffic and time of a recipe on so many GPUs, none of which is needed. Exit 2 if it does not fit."""
    from launcher.plan import plan as make
    from launcher.plan import report
    from launcher.plan.gpus import load
    from launcher.plan.search import changes, nearest
    from launcher.plan.search import search as find

    loaded = load_recipe(recipe, overrides or ())
    cluster = loaded.cluster
    nodes, gpus = nodes or cluster.nodes, gpus or cluster.tasks
    device = replace(load(gpu or cluster.gpu), gpus_per_node=gpus)
    out = Console(width=max(Console().width, 100))
    if search:
        with console.status("Planning every layout"):
            plans = find(loaded, nodes, gpus, device)
        if not plans:
            raise UserError(f"no layout of {loaded.run} fits on {nodes} x {gpus} {device.name}")
        if as_json:
            print(json.dumps([made.as_dict() for made in plans[:top]], indent=1))
        else:
            out.print(report.ranking(plans, top))
        return
    near = nearest(loaded, nodes * gpus, gpus)
    if near is not loaded:
        changed = " ".join(changes(loaded, near))
        console.print(f"The recipe's layout does not divide over {nodes * gpus} ranks; planned with {changed}.")
    made = make(near, nodes, gpus, device)
    if as_json:
        print(json.dumps(made.as_dict(), indent=1))
    else:
        out.print(report.as_tables(made), highlight=False)
    if made.margin < 0:
        raise report.refuse(made, loaded, device)


def scale(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, such as 1,2,4,8.")] = "1,2,4",
    weak: Annotated[bool, typer.Option("--weak/--strong", help="Whether the batch grows with the nodes.")] = False,
    steps: Annotated[int, typer.Option(min=5, help="Steps of every run.")] = 50,
    local: Annotated[bool, typer.Option("--local", help="On this machine by torchrun, without SLURM.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the jobs, or submit and leave.")] = True,
    runs: RunsFolder = Path("runs"),
) -> None:
    """Train a recipe on several numbers of nodes; the same command again gathers what is done. Table, JSON and plot."""
    from launcher.scale import Study, as_table

    numbers = _numbers(nodes)
    if numbers is None or 0 in numbers:
        raise UserError(f"--nodes: {nodes!r} is no list of numbers, such as 1,2,4")
    study = Study(recipe, list(overrides or ()), numbers, weak=weak, steps=steps, runs=runs)
    if local:
        study.run_here()
    else:
        study.submit()
        if not wait:
            console.print(f"Submitted; the same command gathers what is done into {study.folder}.", markup=False)
            return
        with console.status("Waiting for the jobs"):
            study.wait()
    found = study.gather()
    Console(width=max(Console().width, 100)).print(as_table(found))
    console.print(f"{study.folder}/scaling.json, {study.folder}/scaling.png", markup=False)


def study(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Recipes and study.yaml, such as recipes/study.")],
    overrides: Overrides = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many runs of each variant, or their seeds: 3, or 0,2,5. The plan's.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run this variant alone; repeat it for more.")] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="Run the plan's ablations too.")] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long: runs save a checkpoint; the page is written.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of a run, by torchrun, with a GPU each.")] = 1,
    on_slurm: Annotated[bool, typer.Option("--slurm", help="Submit the runs as jobs.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="With --slurm: wait for the jobs, or leave.")] = True,
    publish: Annotated[Path | None, typer.Option(help="Also put the page and its data into this folder.")] = None,
    runs: RunsFolder = Path("runs"),
) -> None:
    """Compare models on equal terms: runs what is missing, scores it, and writes RUNS/NAME/index.html and study.json.

    Without --slurm a run at a time on each GPU, or on the CPU. Exit code 1 where a run failed, 75 where time was up.
    """
    from ecdit.stop import StopRequest
    from ecdit.study.page import write
    from ecdit.study.plan import Study
    from launcher.study import STOPPED, Runner

    stop = StopRequest().listen()
    made = Study(
        folder, overrides or (), seeds=_seeds(seeds), only=only or (), ablations=ablations or bool(only), runs=runs
    )
    if publish is not None:
        check_folder(publish, "--publish")
    runner = Runner(made, on_slurm=on_slurm)
    if on_slurm:
        runner.submit()
        if not wait:
            console.print(f"Submitted; the same command gathers what is done into {made.folder}.", markup=False)
            return
        runner.wait(stop)
    runner.run_here(stop, seconds=None if minutes is None else 60 * minutes, ranks=ranks)
    stop.close()
    for line in write(made, publish):
        console.print(line, markup=False)
    for failure in runner.failures:
        console.print(f"{failure.name} failed: {failure.why} ({failure.log})", markup=False)
    raise typer.Exit(1 if runner.failures else STOPPED if runner.stopped else 0)


def _seeds(text: str | None) -> list[int] | None:
    """A number of seeds, or a list of them."""
    if text is None:
        return None
    numbers = _numbers(text)
    if numbers in (None, [0]):
        raise UserError(f"--seeds: {text!r} is no number of seeds or list of them, such as 3 or 0,2,5")
    return list(range(numbers[0])) if len(numbers) == 1 else numbers


def _numbers(text: str) -> list[int] | None:
    """What commas part; None where not all are whole numbers, in the digits 0 to 9, and no longer than any of use."""
    return [int(part) for part in text.split(",")] if re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text) else None


def supervise(
    recipe: RecipeFile,
    words: Annotated[list[str], typer.Argument(metavar="[KEY=VALUE]... -- COMMAND...", help="Keys, then the command.")],
    runs: RunsFolder = Path("runs"),
) -> None:
    """Run a training command until the run is done: what the batch files do. Starts it again after a crash."""
    from launcher.supervise import Supervisor

    first = next((i for i, word in enumerate(words) if "=" not in word), len(words))
    overrides, command = words[:first], words[first:]
    if not command:
        raise UserError("supervise: no command is given; it follows --, such as -- torchrun -m ecdit.cli train")
    loaded = load_recipe(recipe, overrides)
    raise typer.Exit(Supervisor(loaded, [str(recipe), *overrides], command, runs).supervise())


def preflight(recipe: RecipeFile, overrides: Overrides = None, runs: RunsFolder = Path("runs")) -> None:
    """Look at this node before a job's first step; the supervisor starts it on every node."""
    from launcher.preflight import check, report

    print(report(check(load_recipe(recipe, overrides or ()), runs)), flush=True)
