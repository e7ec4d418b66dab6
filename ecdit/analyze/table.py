"""Table 1 of the paper beside our counts, cell by cell, with each remaining difference named."""

from collections.abc import Sequence

from rich.table import Table

from ecdit.errors import UserError
from ecdit.model.count import Count, count_parameters, table_recipe
from ecdit.model.sizes import SIZES, table_rows

BILLION = 1e9


def counts(names: Sequence[str]) -> list[Count]:
    """Counts of the named models, or of all. Raises UserError for a name that Table 1 does not have."""
    rows = {name: (size, experts) for name, size, experts in table_rows()}
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no model of Table 1; valid: {', '.join(rows)}")
    return [count_parameters(name, table_recipe(*rows[name])) for name in names or rows]


def comparison(rows: Sequence[Count]) -> Table:
    """Billions of parameters, the paper's figure and ours for each of: the total; the activated ones; the total over
    the dense model's; the activated ones over the dense model's; the idle experts (total less activated).

    M has other depths dense (46) and sparse (38), so that nothing of it is compared over dense.
    """
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("\nmodel", no_wrap=True)
    for group in ("total", "activated", "over dense", "act. over dense", "idle"):
        table.add_column(f"{group}\npaper", justify="right", no_wrap=True)
        table.add_column("\nours", justify="right", no_wrap=True)
    shapes = {name: (size, experts) for name, size, experts in table_rows()}
    for row in rows:
        size, experts = shapes[row.name]
        printed = SIZES[size].printed
        total = printed[f"{experts}E" if experts else "dense"]
        pairs = [(total, row.total)]
        if experts:
            dense = None if SIZES[size].sparse_layers else count_parameters("", table_recipe(size, 0)).total
            active = printed["activated"]
            pairs.append((active, row.activated))
            pairs += (
                [(None, 0)] * 2
                if dense is None
                else [
                    (total - printed["dense"], row.total - dense),
                    (active - printed["dense"], row.activated - dense),
                ]
            )
            pairs.append((total - active, row.total - row.activated))
        cells = [["", ""] if paper is None else [f"{paper:.2f}", f"{ours / BILLION:.2f}"] for paper, ours in pairs]
        table.add_row(row.name, *(cell for pair in cells for cell in pair))
    return table


NOTES = """
Billions of parameters, the paper's frozen encoders (670M text encoder, 34M autoencoder) counted in. A difference of
two printed numbers is exact to 0.01. What differs from the paper, and why:
- The dense part of a size, the same in every model of it: 8% short at XL, 5% at XXL, 1% at 3XL, 1% over at M. The
  paper's totals fit 704M + D (147,000 + L D (14.84 + 4 KV/H)) within 4M; no natural part of a diffusion transformer
  has 147,000 D parameters. Ours has 16 + 4 KV/H for each L D^2 (attention 4 + 4 KV/H, AdaLN 4, FFN 8) and small
  embeddings and head.
- Activated parameters of 3XL: the paper's 5.18 is 0.68 over dense, the second expert of 16 MoE layers; its totals, and
  ours, have 21 such layers, 0.89. The idle column of 3XL differs by the same 0.21.
The experts themselves agree to the last printed digit: 8 D^2 each, no biases; a router adds D E a layer."""
