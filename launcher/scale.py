"""`ecdit scale`: the same recipe on several numbers of nodes, measured beside what was planned.

Every number of nodes is a run of its own in the study's folder, so a study that was interrupted goes on where it was,
and one that was submitted can be gathered later.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from ecdit.callbacks.metrics import read_steps
from ecdit.errors import UserError
from ecdit.recipe_io import load_recipe
from ecdit.run import Run
from ecdit.status import read_status
from launcher import slurm
from launcher.launch import launch
from launcher.plan import plan
from launcher.plan.gpus import load as load_gpu
from launcher.plan.gpus import of_cluster
from launcher.plan.search import best_layout
from parallel.checkpoint.folder import committed

GIB = 2**30
WARM = 0.2  # share of the steps that come before those that count
SECONDS_BETWEEN_LOOKS = 2.0
ENDED = ("finished", "failed", "cancelled")
# what a run may change on its way, but not while its speed is measured
MEASURED = ("train.", "parallel.", "engine_options.", "data.", "cluster.nodes", "cluster.gpu")
MEASURED += ("cluster.tasks_per_node", "cluster.cpus_per_task")


class Study:
    """A recipe on several numbers of nodes. weak: the batch grows with the nodes; else it is the recipe's."""

    def __init__(self, file: Path, overrides: list[str], nodes: list[int], *, weak: bool, steps: int, runs: Path):
        self.file, self.nodes, self.weak, self.steps = file, sorted(set(nodes)), weak, steps
        self.recipe = load_recipe(file, overrides)
        self.folder = runs / f"{self.recipe.run}-{'weak' if weak else 'strong'}"
        self._overrides = overrides
        self._given = {nodes: self._keys(nodes) for nodes in self.nodes}  # all are checked before the first starts

    def _keys(self, nodes: int) -> list[str]:
        """The overrides of one run. Raises UserError where there is no layout for so many nodes."""
        recipe = self.recipe
        batch = recipe.train.batch
        if self.weak:
            if batch * nodes % self.nodes[0]:
                raise UserError(f"--weak: train.batch: {batch} on {self.nodes[0]} nodes has no equal on {nodes}")
            batch = batch * nodes // self.nodes[0]
        keys = [
            *self._overrides,
            f"run=nodes-{nodes}",
            f"cluster.nodes={nodes}",
            f"cluster.min_nodes={nodes}",
            f"train.batch={batch}",
            f"train.steps={self.steps}",
            f"checkpoint.every={self.steps}",
            f"log.collectives={max(1, self.steps // 2)}",
            "log.every=1",
            "log.grid_every=0",
            "log.tensorboard=false",
        ]
        made = load_recipe(self.file, keys)
        return [*keys, *best_layout(made, nodes, made.cluster.tasks, of_cluster(made.cluster))]

    # --------------------------------------------------------------------------------------------------------- running

    def submit(self) -> None:
        """Submits the jobs of the runs that are neither done nor under way. Raises UserError before the first where one
        that is there is another."""
        self._check()
        for nodes in self.nodes:
            status = self._status(nodes)
            if status.get("state") != "finished" and not slurm.alive(status.get("job")):
                launch(self.file, self._given[nodes], None, self.folder)

    def run_here(self) -> None:
        """Runs them one after the other on this machine, a process a task. Raises UserError before the first where one
        that is there is another, and for one that fails."""
        self._check()
        for nodes in self.nodes:
            if self._status(nodes).get("state") == "finished":
                continue
            ranks = nodes * self.recipe.cluster.tasks
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += ["-m", "ecdit.cli", "train", str(self.file), *self._given[nodes], "--runs", str(self.folder)]
            environment = {"OMP_NUM_THREADS": "1"} | os.environ
            if subprocess.run(command, env=environment).returncode:
                raise UserError(f"{self.folder}/nodes-{nodes}: the run failed; {self._status(nodes).get('why', '')}")

    def _check(self) -> None:
        """Raises UserError where a run that is done, or that would be gone on with, is not the one that is asked for.
        One without a checkpoint begins anew."""
        for nodes in self.nodes:
            run = Run(self.folder / f"nodes-{nodes}")
            done = self._status(nodes).get("state") == "finished"
            if run.recipe_file.exists() and (done or committed(run.checkpoints) or self._under_way(nodes)):
                asked = load_recipe(self.file, self._given[nodes])
                run.check_started_with(asked, "give another name with run=", MEASURED)

    def wait(self) -> None:
        """Until every run has ended, or has no job that could still end it."""
        while any(self._under_way(nodes) for nodes in self.nodes):
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _under_way(self, nodes: int) -> bool:
        status = self._status(nodes)
        return status.get("state") not in ENDED and slurm.alive(status.get("job"))

    def _status(self, nodes: int) -> dict[str, Any]:
        return read_status(self.folder / f"nodes-{nodes}")

    # ------------------------------------------------------------------------------------------------------- gathering

    def gather(self) -> dict[str, Any]:
        """What is measured and planned, also as scaling.json and scaling.png in the study's folder.

        Raises UserError where no run is done, or one was started with other keys.
        """
        self._check()  # a job that had not begun before may have been submitted with others
        rows = [row for row in map(self._row, self.nodes) if row is not None]
        if not rows:
            states = {nodes: self._status(nodes).get("state", "not begun") for nodes in self.nodes}
            raise UserError(f"{self.folder}: no run is done yet: {states}")
        first = rows[0]
        for row in rows:
            fair = first["images_per_s"] * row["nodes"] / first["nodes"]
            row["efficiency"] = row["images_per_s"] / fair
            planned = first["planned"]["images_per_s"] * row["nodes"] / first["nodes"]
            row["planned"]["efficiency"] = row["planned"]["images_per_s"] / planned
        study = {"recipe": str(self.file), "mode": "weak" if self.weak else "strong", "steps": self.steps, "rows": rows}
        (self.folder / "scaling.json").write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
        draw(study, self.folder / "scaling.png")
        return study

    def _row(self, nodes: int) -> dict[str, Any] | None:
        run = self.folder / f"nodes-{nodes}"
        if self._status(nodes).get("state") != "finished":
            return None
        recipe = load_recipe(run / "recipe.yaml")
        records = read_steps(run / "metrics.jsonl")
        # the step that is profiled is slower, and so are the first ones
        late = [r for r in records if r["step"] > WARM * self.steps and r["step"] != recipe.log.collectives]
        file = run / "collectives.json"
        collectives = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"seconds": {}}
        made = plan(recipe, nodes, recipe.cluster.tasks, of_cluster(recipe.cluster) or load_gpu(recipe.cluster.gpu))
        planned: dict[str, float] = {}
        for one in made.traffic:
            planned[one.kind] = planned.get(one.kind, 0.0) + one.seconds
        return {
            "nodes": nodes,
            "ranks": nodes * recipe.cluster.tasks,
            "batch": recipe.train.batch,
            "images_per_s": median(r["images_per_s"] for r in late),
            "mfu": median(r["mfu"] for r in late),
            "seconds": median(r["seconds"] for r in late),
            "memory": max(r["memory"] for r in records),
            "collectives": collectives["seconds"],
            "planned": {
                "gpu": made.gpu,
                "images_per_s": made.images_per_s,
                "mfu": made.mfu,
                "seconds": made.step_seconds,
                "memory": made.worst.peak,
                "collectives": planned,
            },
        }


def as_table(study: dict[str, Any]) -> Table:
    """For the terminal: measured, and in brackets planned."""
    table = Table(title=f"{study['mode']} scaling, measured (planned for {study['rows'][0]['planned']['gpu']})")
    kinds = list(dict.fromkeys(kind for row in study["rows"] for kind in row["collectives"]))
    for column in (
        "nodes",
        "ranks",
        "batch",
        "images/s",
        "efficiency",
        "MFU",
        "GiB",
        *(f"{kind} ms" for kind in kinds),
    ):
        table.add_column(column, justify="right")
    for row in study["rows"]:
        planned = row["planned"]
        table.add_row(
            *(str(row[key]) for key in ("nodes", "ranks", "batch")),
            f"{row['images_per_s']:.0f} ({planned['images_per_s']:.0f})",
            f"{row['efficiency']:.0%} ({planned['efficiency']:.0%})",
            f"{row['mfu']:.1%} ({planned['mfu']:.1%})",
            f"{row['memory'] / GIB:.2f} ({planned['memory'] / GIB:.2f})",
            *(
                f"{1e3 * row['collectives'].get(kind, 0):.1f} ({1e3 * planned['collectives'].get(kind, 0):.1f})"
                for kind in kinds
            ),
        )
    return table


def draw(study: dict[str, Any], file: Path) -> None:
    """images/s and efficiency over the nodes, measured and planned."""
    from matplotlib.figure import Figure

    rows = study["rows"]
    nodes = [row["nodes"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, share = figure.subplots(1, 2)
    first = rows[0]
    ideal = [first["images_per_s"] * n / first["nodes"] for n in nodes]
    speed.plot(nodes, ideal, color="0.7", label="ideal")
    speed.plot(nodes, [row["images_per_s"] for row in rows], "o-", label="measured")
    speed.set(xlabel="nodes", ylabel="images/s", title=f"{study['mode']} scaling")
    speed.legend()
    share.plot(nodes, [row["efficiency"] for row in rows], "o-", label="measured")
    share.plot(nodes, [row["planned"]["efficiency"] for row in rows], "s--", label="planned")
    share.set(xlabel="nodes", ylabel="efficiency", ylim=(0, 1.15))
    share.legend()
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(nodes, [str(n) for n in nodes])
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
