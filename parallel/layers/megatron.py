"""megatron-core's column- and row-parallel linears."""

import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from parallel.layers import describe_linear


class MegatronLinears:
    """megatron-core's, which also overlap the gathering of a gradient with the product beside it."""

    def __init__(self, group: dist.ProcessGroup, sequence: bool):
        self.group = group
        # its own initialisation makes the whole weight on every rank, or draws from a rank's own stream
        self._config = ModelParallelConfig(
            tensor_model_parallel_size=group.size(),
            sequence_parallel=sequence,
            use_cpu_initialization=True,
            perform_initialization=False,
        )

    def column(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        linear = _Column(fan_in, fan_out, config=self._config, init_method=_none, bias=False, tp_group=self.group)
        return describe_linear(linear, fan_in, fan_out, dim=0, rank=self.group.rank(), std=std)

    def row(self, fan_in: int, fan_out: int, *, std: float | None = None) -> nn.Module:
        linear = _Row(
            fan_in,
            fan_out,
            config=self._config,
            init_method=_none,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=self.group,
        )
        return describe_linear(linear, fan_in, fan_out, dim=1, rank=self.group.rank(), std=std)


def _none(_weight: Tensor) -> None:
    """megatron-core asks for an initialisation; ours comes later, for all parameters."""


class _Column(ColumnParallelLinear):
    """Returns the output alone, and adds nothing to a state dict."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Row(RowParallelLinear):
    """Likewise."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]
