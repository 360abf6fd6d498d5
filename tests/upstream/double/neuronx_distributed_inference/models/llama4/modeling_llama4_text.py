"""Llama 4's language model. Its converter takes a layer's experts stacked.

The attention is that of the other models here, and not Llama 4's own: what counts is what is done
with the experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from neuronx_distributed.modules.moe.model import Experts
from neuronx_distributed.parallel_layers.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    sum_over_ranks,
)
from torch import nn

from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.moe_v2 import initialize_moe_module

_RENAMED = {
    "router.weight": "moe.router.linear_router.weight",
    "experts.gate_up_proj": "moe.expert_mlps.mlp_op.gate_up_proj.weight",
    "experts.down_proj": "moe.expert_mlps.mlp_op.down_proj.weight",
    "shared_expert.gate_proj.weight": "moe.shared_experts.gate_proj.weight",
    "shared_expert.up_proj.weight": "moe.shared_experts.up_proj.weight",
    "shared_expert.down_proj.weight": "moe.shared_experts.down_proj.weight",
}


class LlamaInferenceConfig(InferenceConfig):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.text_config = InferenceConfig(self.neuron_config, **self.text_config)

    @classmethod
    def get_neuron_config_cls(cls) -> type[MoENeuronConfig]:
        return MoENeuronConfig


class NeuronLlama4MLP(nn.Module):
    def __init__(self, config: Any, inner: int) -> None:
        super().__init__()
        hidden, dtype = config.hidden_size, config.neuron_config.torch_dtype
        self.gate_proj, self.up_proj = (
            ColumnParallelLinear(hidden, inner, bias=False, gather_output=False, dtype=dtype)
            for _ in range(2)
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        inner = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return (self.down_proj(inner),)


class _Router(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.linear_router = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The affinity of each token's one expert, ``[T, 1]``, and which it is."""
        logits = self.linear_router(hidden_states)
        chosen = logits.argmax(dim=-1, keepdim=True)
        return logits.gather(1, chosen).sigmoid(), chosen


class _ExpertMLPs(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mlp_op = Experts(
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
            config.neuron_config.torch_dtype,
        )

    def forward(self, hidden_states: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        outputs = self.mlp_op(hidden_states[None].expand(self._experts, -1, -1))
        return outputs[chosen[:, 0], torch.arange(len(hidden_states))]

    @property
    def _experts(self) -> int:
        return int(self.mlp_op.down_proj.weight.shape[0])


class _FusedTokenGeneration(nn.Module):
    """Holds the parts of its block under names of its own."""

    def __init__(self, router: nn.Module, expert_mlps: nn.Module) -> None:
        super().__init__()
        self.router, self.expert_mlps = router, expert_mlps


class _MoE(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.router = _Router(config)
        self.expert_mlps = _ExpertMLPs(config)
        self.shared_experts = NeuronLlama4MLP(config, config.intermediate_size)
        self.moe_fused_tkg = _FusedTokenGeneration(self.router, self.expert_mlps)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        tokens = hidden_states.flatten(0, 1)
        affinities, chosen = self.router(tokens)
        # The affinity is put on what goes into the expert, not on what comes out of it.
        routed = self.expert_mlps(tokens * affinities, chosen)
        output = sum_over_ranks(routed) + self.shared_experts(tokens)[0]
        return (output.view_as(hidden_states),)


class NeuronMoEDecoderLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.moe = initialize_moe_module(config, block=_MoE)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.moe(hidden_states)[0]


class NeuronLlama4TextModel(NeuronBaseModel):
    qk_norm = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            layer.feed_forward = layer.mlp
            del layer.mlp
            if (number + 1) % config.interleave_moe_layer_step == 0:
                layer.feed_forward = NeuronMoEDecoderLayer(config)

    def feed_forward(self, config: Any) -> nn.Module:
        return NeuronLlama4MLP(config, config.intermediate_size_mlp)


class NeuronLlama4TextForCausalLM(NeuronBaseForCausalLM):
    _model_cls = NeuronLlama4TextModel

    @classmethod
    def get_config_cls(cls) -> type[InferenceConfig]:
        return LlamaInferenceConfig

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
        state_dict["lm_head.weight"] = state_dict.pop("language_model.lm_head.weight")
        for name in [name for name in state_dict if name.startswith("language_model.model.")]:
            state_dict[name.removeprefix("language_model.model.")] = state_dict.pop(name)
        ranks = torch.arange(config.neuron_config.tp_degree, dtype=torch.int32)
        state_dict["rank_util.rank"] = ranks
        for layer in range(config.num_hidden_layers):
            path = f"layers.{layer}.feed_forward"
            for old, new in _RENAMED.items():
                if f"{path}.{old}" in state_dict:
                    state_dict[f"{path}.{new}"] = state_dict.pop(f"{path}.{old}")
            state_dict[f"layers.{layer}.self_attn.rank_util.rank"] = ranks.clone()
        return state_dict
