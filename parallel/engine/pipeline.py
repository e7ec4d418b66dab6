"""Pipeline parallelism through megatron-core's 1F1B schedule.

A stage sends the next one tensor for each micro-batch: its activations with the conditioning beside them, so that
every stage has text and time, and no weight lives on two stages.
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from parallel.engine import Loss
from parallel.topology import Topology


class Pipeline:
    """One rank's stage, as the schedule wants it."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, ddp: DistributedDataParallel, topology: Topology):
        self._ddp, self._topology = ddp, topology
        self.config = TransformerConfig(
            num_layers=topology.layout.pipeline,
            hidden_size=1,
            num_attention_heads=1,
            pipeline_model_parallel_size=topology.layout.pipeline,
            pipeline_dtype=next(ddp.module.parameters()).dtype,
            no_sync_func=ddp.no_sync,
            batch_p2p_sync=False,  # a device-wide synchronisation that old versions of torch needed
        )
        self._received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Called by the schedule before each forward pass: what the stage before has sent."""
        self._received = tensors[0]

    def run(self, micro_batches: Iterable[Any], count: int, loss: Loss, hidden_shape: tuple[int, ...]) -> Tensor:
        """Forward and backward of all micro-batches; the sum of this stage's parts of the losses."""
        total = torch.zeros((), device=self._topology.device)

        def forward(batches: Any, stage: "Pipeline"):
            value, part = loss(self._ddp, next(batches), stage._received)
            total.add_(part.detach())
            # the schedule divides the loss by the number of micro-batches
            return value, lambda output: (output * count, output.detach())

        images, tokens, self.config.hidden_size = hidden_shape
        groups = self._topology.groups
        forward_backward_pipelining_without_interleaving(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=self,
            num_microbatches=count,
            seq_length=images,
            micro_batch_size=tokens,
            p2p_communicator=P2PCommunicator(groups.pp, self.config),
            pg_collection=groups,
        )
        return total
