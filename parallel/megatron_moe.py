"""megatron-core's own MoE layer, dropless top-2 token choice: the baseline that a user would otherwise have.

It needs a GPU and Transformer Engine (its grouped products). Its router's auxiliary loss has its gradient added in
the backward pass; it is part of no loss that is told.

Shapes: `N` tokens, `D` hidden, `E` experts.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from parallel.parameters import Block, describe, xavier
from parallel.topology import Topology


class MegatronMoe(nn.Module):
    """Top-2 of E experts, softmax over all before the choice, no capacity. No biases, GELU in its tanh form."""

    def __init__(self, topology: Topology, width: int, experts: int, aux_loss: float):
        super().__init__()
        layout, groups = topology.layout, topology.groups
        config = TransformerConfig(
            num_layers=1,
            hidden_size=width,
            ffn_hidden_size=4 * width,
            num_attention_heads=layout.tensor,
            activation_func=_gelu,
            add_bias_linear=False,
            num_moe_experts=experts,
            moe_router_topk=2,
            moe_router_pre_softmax=True,
            moe_router_dtype="fp32",
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=aux_loss,
            moe_token_dispatcher_type="alltoall",
            moe_grouped_gemm=True,
            tensor_model_parallel_size=layout.tensor,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
            sequence_parallel=layout.tensor > 1,  # tensor ranks have tokens of their own, as it then expects
            perform_initialization=False,
            params_dtype=torch.float32,
        )
        spec = get_moe_module_spec(use_te=True, num_experts=experts, moe_grouped_gemm=True)
        self.layer = MoELayer(config, spec.submodules, layer_number=1, pg_collection=groups)
        describe(self.layer.router.weight, width**-0.5, Block((experts, width), (0, 0)))
        self.layer.router.weight.reads_own_tokens = True
        here, hidden = experts // layout.expert, groups.expt_tp.rank() * 4 * width // layout.expert_tensor
        for i in range(here):
            up = getattr(self.layer.experts.linear_fc1, f"weight{i}")
            down = getattr(self.layer.experts.linear_fc2, f"weight{i}")
            describe(up, xavier(width, 4 * width), Block((4 * width, width), (hidden, 0)))
            describe(down, 0.0, Block((width, 4 * width), (0, hidden)))
            for weight in (up, down):
                weight.expert, weight.number = True, groups.ep.rank() * here + i

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        return self.layer(tokens[:, None])[0][:, 0]


def set_share(share: float, device: torch.device) -> None:
    """Which share of a step's batch a micro-batch is; the auxiliary loss of each is weighted by it."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(share, device=device))


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
