"""Transformer Engine's linears. Importing this needs the extra `te` and a GPU."""

import torch
import torch.distributed as dist
import transformer_engine.pytorch as te
from torch import nn

from parallel.layers import describe_linear


class TransformerEngineLinears:
    """Transformer Engine's, which compute in FP8 under its autocast."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool):
        self.group, self.sequence = group, sequence

    def column(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        return self._make(fan_in, fan_out, "column", 0, std)

    def row(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        return self._make(fan_in, fan_out, "row", 1, std)

    def _make(self, fan_in: int, fan_out: int, mode: str, dim: int, std: float | None) -> nn.Module:
        size = self.group.size()
        linear = te.Linear(
            fan_in,
            fan_out,
            bias=False,
            tp_group=self.group,
            tp_size=size,
            sequence_parallel=self.sequence,
            parallel_mode=mode if size > 1 else None,
            params_dtype=torch.float32,
            device=torch.empty(0).device,  # the context's, as for every other parameter
        )
        return describe_linear(linear, fan_in, fan_out, dim=dim, rank=self.group.rank(), std=std)
