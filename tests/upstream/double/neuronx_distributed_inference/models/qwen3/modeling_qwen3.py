"""Dense Qwen3."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn
from transformers import Qwen3ForCausalLM

from neuronx_distributed_inference.models.config import InferenceConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel


class Qwen3InferenceConfig(InferenceConfig):
    def get_required_attributes(self) -> list[str]:
        return ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"]


class NeuronMLP(nn.Module):
    def __init__(self, config: InferenceConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        dtype = config.neuron_config.torch_dtype
        self.gate_proj = ColumnParallelLinear(
            hidden, inner, bias=False, gather_output=False, dtype=dtype
        )
        self.up_proj = ColumnParallelLinear(
            hidden, inner, bias=False, gather_output=False, dtype=dtype
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias=False, dtype=dtype)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        inner = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return (self.down_proj(inner),)


def convert_qwen3_hf_to_neuron_state_dict(
    state_dict: dict[str, Any], config: InferenceConfig
) -> dict[str, Any]:
    ranks = torch.arange(config.neuron_config.tp_degree, dtype=torch.int32)
    state_dict["rank_util.rank"] = ranks
    for layer in range(config.num_hidden_layers):
        attention = f"layers.{layer}.self_attn"
        state_dict[f"{attention}.rank_util.rank"] = ranks.clone()
        for name in ("q", "k"):
            # Left where it is, as the real one leaves it.
            weight = state_dict[f"{attention}.{name}_norm.weight"].clone()
            state_dict[f"{attention}.{name}_layernorm.weight"] = weight
    return state_dict


class NeuronQwen3Model(NeuronBaseModel):
    def feed_forward(self, config: InferenceConfig) -> nn.Module:
        return NeuronMLP(config)


class NeuronQwen3ForCausalLM(NeuronBaseForCausalLM):
    _model_cls = NeuronQwen3Model

    @classmethod
    def get_config_cls(cls) -> type[InferenceConfig]:
        return Qwen3InferenceConfig

    @staticmethod
    def load_hf_model(model_path: str) -> Any:
        return Qwen3ForCausalLM.from_pretrained(model_path)

    @staticmethod
    def convert_hf_to_neuron_state_dict(
        state_dict: dict[str, Any], config: InferenceConfig
    ) -> dict[str, Any]:
        return convert_qwen3_hf_to_neuron_state_dict(state_dict, config)
