"""`ecdit launch`: a run's job on SLURM, begun or gone on with, on as many nodes as asked for."""

from pathlib import Path

from ecdit.errors import UserError
from ecdit.recipe import Recipe
from ecdit.recipe_io import load_recipe
from ecdit.status import read_status, update_status
from launcher import slurm
from launcher.plan.gpus import of_cluster
from launcher.plan.search import best_layout

LOG = "slurm-%j.log"


def for_nodes(file: Path, overrides: list[str], nodes: int | None) -> tuple[Recipe, list[str], list[str]]:
    """The recipe, the overrides that make it one for so many nodes, and the layout that the job will choose there.

    Raises UserError where the model and the batch have no layout for them.
    """
    recipe = load_recipe(file, overrides)
    if nodes is not None:
        overrides = [*overrides, f"cluster.nodes={nodes}"]
        if recipe.cluster.min_nodes is not None:
            overrides.append(f"cluster.min_nodes={min(nodes, recipe.cluster.min_nodes)}")
        recipe = load_recipe(file, overrides)
    cluster = recipe.cluster
    return recipe, overrides, best_layout(recipe, cluster.nodes, cluster.tasks, of_cluster(cluster))


def batch_file(file: Path, recipe: Recipe, overrides: list[str], runs: Path) -> str:
    """The run's batch file. What it logs goes into the run's folder."""
    log = str(runs / recipe.run / "logs" / LOG)
    return slurm.render(recipe, str(file), tuple(overrides), log, str(runs))


def launch(file: Path, overrides: list[str], nodes: int | None, runs: Path) -> str:
    """Submits the job and returns its number. Raises UserError where one trains the run already."""
    recipe, overrides, _ = for_nodes(file, overrides, nodes)
    run = runs / recipe.run
    status = read_status(run)
    if slurm.alive(status.get("job")):
        raise UserError(f"{run}: job {status['job']} trains this run; wait for it, cancel it, or name another run")
    (run / "logs").mkdir(parents=True, exist_ok=True)
    script = run / "job.slurm"
    script.write_text(batch_file(file, recipe, overrides, runs), encoding="utf-8")
    # said before the job can start and say something else
    update_status(run, state="pending", kind="", why="", job=None, crashes=[], excluded=[])
    number = slurm.submit(script)
    if read_status(run).get("state") == "pending":
        update_status(run, job=number)
    return number
