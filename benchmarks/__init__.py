"""Benchmarks: each measures the product and its peers in one run. `ecdit bench NAME` runs them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from benchmarks import block, checkpoint, data, dispatch, engines, kernels, moe, plan, sample, step
from benchmarks.budget import NOTHING, Asked
from benchmarks.harness import Row, machine
from ecdit.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """`takes`: the fields of `Asked` that it heeds."""

    rows: Callable[[Asked], list[Row]]
    takes: tuple[str, ...] = ()


BENCHMARKS = {
    "moe": Benchmark(moe.rows, ("seconds", "trace", "only")),
    "block": Benchmark(block.rows, ("seconds", "trace", "only")),
    "step": Benchmark(step.rows, ("seconds", "trace", "only", "recipe", "overrides")),
    "dispatch": Benchmark(dispatch.rows, ("seconds", "trace")),
    "sample": Benchmark(sample.rows, ("seconds", "trace", "only", "steps")),
    "kernels": Benchmark(lambda asked: kernels.rows()),
    "checkpoint": Benchmark(lambda asked: checkpoint.rows()),
    "plan": Benchmark(lambda asked: plan.rows()),
    "engines": Benchmark(lambda asked: engines.rows()),
    "data": Benchmark(lambda asked: data.rows()),
}
OPTIONS = {  # as the command line has them
    "seconds": "--seconds", "trace": "--profile", "steps": "--steps", "only": "--only", "recipe": "RECIPE",
    "overrides": "KEY=VALUE",
}  # fmt: skip


def check(name: str, asked: Asked) -> None:
    """Raises UserError for a name that is none, and for an option that this benchmark does not heed."""
    if name not in BENCHMARKS:
        raise UserError(f"{name!r} is no benchmark; valid: {', '.join(BENCHMARKS)}")
    for option, value in vars(asked).items():
        if value not in (None, ()) and option not in BENCHMARKS[name].takes:
            takers = [other for other, benchmark in BENCHMARKS.items() if option in benchmark.takes]
            raise UserError(f"{OPTIONS[option]}: not for {name}, but for {', '.join(takers)}")
    asked.check()


def report(name: str, asked: Asked = NOTHING) -> dict[str, Any]:
    """{"machine": {...}, "rows": [...]} of one benchmark; a row has the fields of `Row`."""
    return {"machine": machine(), "rows": [asdict(row) for row in BENCHMARKS[name].rows(asked)]}


def as_table(result: dict[str, Any]) -> Table:
    """The rows for a terminal."""
    table = Table(box=None, title=", ".join(f"{k} {v}" for k, v in result["machine"].items()), title_justify="left")
    for column in ("name", "ms", "spread", "against", "ratio", "about"):
        table.add_column(column, justify="right" if column in ("ms", "spread", "ratio") else "left")
    for row in (Row(**row) for row in result["rows"]):
        taken = "" if row.milliseconds is None else f"{row.milliseconds:.4g}"
        spread = "" if row.spread is None else "-".join(f"{taken:.4g}" for taken in row.spread)
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        about = [f"failed: {row.failed}"] if row.failed else []
        about += [f"{value:.3g} {what}" for what, value in row.about.items()]
        table.add_row(row.name, taken, spread, row.against or "", ratio, ", ".join(about))
    return table
