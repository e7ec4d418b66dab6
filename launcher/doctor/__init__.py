"""`ecdit doctor`: what this machine has and lacks for training, and what the lack costs.

Each check is by itself: one that fails says so in its line. What touches a GPU, imports a library or writes to a disk
runs in a process of its own with a time limit, so that a driver that hangs is reported and not suffered.
"""

from collections.abc import Callable

from rich.markup import escape
from rich.table import Table

from launcher.doctor import cluster, gpus, machine, packages
from launcher.doctor.finding import BROKEN, MISSING, OK, WARNING, Finding
from launcher.doctor.needs import for_recipe, require

__all__ = [
    "BROKEN",
    "CHECKS",
    "MISSING",
    "OK",
    "WARNING",
    "Finding",
    "as_table",
    "cannot_train",
    "examine",
    "for_recipe",
    "require",
]

CHECKS: list[Callable[[], list[Finding]]] = [
    packages.python, packages.needed, gpus.gpus, gpus.transformer_engine, packages.apex, packages.torchvision,
    packages.triton, packages.optional, packages.deepspeed, cluster.slurm, cluster.infiniband,
    machine.shared_memory, machine.limits, machine.disk, machine.host,
]  # fmt: skip


def examine() -> list[Finding]:
    """All checks, in order."""
    return [finding for check in CHECKS for finding in guarded(check)]


def cannot_train(findings: list[Finding]) -> bool:
    """Whether something is broken that every run needs."""
    spared = {one.name for one in (*packages.OPTIONAL, packages.TRANSFORMER_ENGINE)}
    return any(one.state == BROKEN and one.name not in spared for one in findings)


def guarded(check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check, or that it failed."""
    try:
        return check()
    except Exception as error:  # whatever it is, the other checks can still be made
        why = f"cannot be told: {type(error).__name__}: {error}"
        return [Finding(check.__name__.replace("_", " "), WARNING, why, "unknown")]


def as_table(findings: list[Finding]) -> Table:
    """For the terminal."""
    colours = {OK: "green", MISSING: "yellow", WARNING: "yellow", BROKEN: "red"}
    table = Table("what", "state", "found", "what the lack costs, what to do")
    for one in findings:
        table.add_row(one.name, f"[{colours[one.state]}]{one.state}[/]", escape(one.found), escape(one.costs))
    return table
