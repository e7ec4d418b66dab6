"""Benchmarks: each measures the product and its peers in one run. `ecdit bench NAME` runs them."""

from typing import Any

from rich.table import Table

from benchmarks import checkpoint, data, engines, kernels, moe, plan
from benchmarks.harness import Row, machine

BENCHMARKS = {
    "moe": moe.rows,
    "kernels": kernels.rows,
    "checkpoint": checkpoint.rows,
    "plan": plan.rows,
    "engines": engines.rows,
    "data": data.rows,
}


def report(name: str) -> dict[str, Any]:
    """{"machine": {...}, "rows": [{"name", "milliseconds", "against", "ratio"}]} of one benchmark."""
    return {"machine": machine(), "rows": [vars(row) for row in BENCHMARKS[name]()]}


def as_table(result: dict[str, Any]) -> Table:
    """The rows for a terminal."""
    table = Table(box=None, title=", ".join(f"{k} {v}" for k, v in result["machine"].items()), title_justify="left")
    for column in ("name", "ms", "against", "ratio"):
        table.add_column(column, justify="left" if column in ("name", "against") else "right")
    for row in (Row(**row) for row in result["rows"]):
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, f"{row.milliseconds:.4g}", row.against or "", ratio)
    return table
