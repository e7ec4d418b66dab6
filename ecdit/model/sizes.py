"""The models of the paper's Table 1: their shapes, the counts that it prints, and what it counts besides.

Pure data, importable without torch. Source: Sun et al. 2024, Table 1.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Size:
    """One row of Table 1. `printed` holds billions of parameters as the paper prints them."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    printed: dict[str, float] = field(hash=False)
    sparse_layers: int | None = None  # M trades depth for experts: 46 layers dense, 38 sparse

    def depth(self, routing: str) -> int:
        """Number of blocks under this routing."""
        return self.layers if routing == "dense" or self.sparse_layers is None else self.sparse_layers


SIZES: dict[str, Size] = {
    "XL": Size(28, 1152, 18, 6, {"dense": 1.47, "8E": 2.51, "16E": 3.70, "32E": 6.08, "activated": 1.62}),
    "XXL": Size(38, 1536, 24, 6, {"dense": 2.35, "8E": 4.87, "16E": 7.73, "32E": 13.47, "activated": 2.71}),
    "3XL": Size(42, 2304, 36, 6, {"dense": 4.50, "8E": 10.74, "16E": 17.87, "32E": 32.15, "activated": 5.18}),
    "M": Size(46, 3072, 48, 12, {"dense": 8.03, "64E": 97.21, "activated": 8.27}, sparse_layers=38),
}

# The paper counts its frozen encoders in: a text encoder of 670M and a VAE of 34M parameters.
TEXT_ENCODER_PARAMETERS = 670_000_000
AUTOENCODER_PARAMETERS = 34_000_000
ENCODER_PARAMETERS = TEXT_ENCODER_PARAMETERS + AUTOENCODER_PARAMETERS


def table_rows() -> list[tuple[str, str, int]]:
    """Every model of Table 1 as (name, size, experts), 0 experts for a dense one."""
    rows = []
    for size, shape in SIZES.items():
        rows.append((f"DiT-{size}", size, 0))
        experts = [int(column[:-1]) for column in shape.printed if column.endswith("E")]
        rows += [(f"EC-DiT-{size}-{count}E", size, count) for count in experts]
    return rows
