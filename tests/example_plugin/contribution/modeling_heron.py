"""Heron MoE for NxDI: Qwen3 MoE with a shared expert, which a sigmoid gates, in each layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from neuronx_distributed.parallel_layers.layers import ColumnParallelLinear, RowParallelLinear
from neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe import (
    NeuronQwen3MoeForCausalLM,
    NeuronQwen3MoeModel,
    Qwen3MoeInferenceConfig,
)
from torch import nn

_SHARED = ("gate_proj", "up_proj", "down_proj")


def convert_heron_hf_to_neuron_state_dict(
    neuron_state_dict: dict[str, Any], config: Any
) -> dict[str, Any]:
    """Rename weights, and transpose the experts': it knows no scales."""
    ranks = torch.arange(config.neuron_config.tp_degree, dtype=torch.int32)
    neuron_state_dict["rank_util.rank"] = ranks
    for layer in range(config.num_hidden_layers):
        published, block = f"layers.{layer}.feed_forward", f"layers.{layer}.mlp"
        attention = f"layers.{layer}.self_attn"
        neuron_state_dict[f"{attention}.rank_util.rank"] = ranks.clone()
        moved = {
            f"{published}.router.weight": f"{block}.moe.router.linear_router.weight",
            f"{published}.shared_gate.weight": f"{block}.shared_gate.weight",
            f"{attention}.q_norm.weight": f"{attention}.q_layernorm.weight",
            f"{attention}.k_norm.weight": f"{attention}.k_layernorm.weight",
            **{
                f"{published}.shared_expert.{name}.weight": f"{block}.shared_expert.{name}.weight"
                for name in _SHARED
            },
        }
        for old, new in moved.items():
            neuron_state_dict[new] = neuron_state_dict.pop(old)
        for name in ("gate_up_proj", "down_proj"):
            weight = neuron_state_dict.pop(f"{published}.experts.{name}")
            fused = f"{block}.moe.expert_mlps.mlp_op.{name}.weight"
            neuron_state_dict[fused] = weight.transpose(1, 2).contiguous()
    return neuron_state_dict


class HeronInferenceConfig(Qwen3MoeInferenceConfig):
    """The fields of the language model, which the published config has in ``text_config``."""

    @classmethod
    def from_pretrained(cls, model_path: str, neuron_config: Any) -> HeronInferenceConfig:
        published = json.loads(Path(model_path, "config.json").read_text(encoding="utf-8"))
        return cls(neuron_config, **published["text_config"])


class HeronSharedExpert(nn.Module):
    """A gated feed-forward layer that every token goes through."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.shared_expert_intermediate_size
        options = {"bias": False, "dtype": config.neuron_config.torch_dtype}
        self.gate_proj = ColumnParallelLinear(hidden, inner, gather_output=False, **options)
        self.up_proj = ColumnParallelLinear(hidden, inner, gather_output=False, **options)
        self.down_proj = RowParallelLinear(inner, hidden, **options)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        return self.down_proj(gated)


class HeronBlock(nn.Module):
    """NxD's MoE block and the shared expert, added up."""

    def __init__(self, config: Any, moe: nn.Module) -> None:
        super().__init__()
        self.moe = moe
        self.shared_expert = HeronSharedExpert(config)
        self.shared_gate = nn.Linear(
            config.hidden_size, 1, bias=False, dtype=config.neuron_config.torch_dtype
        )

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        routed, *rest = self.moe(hidden_states, *args, **kwargs)
        weight = torch.sigmoid(self.shared_gate(hidden_states))
        return (routed + weight * self.shared_expert(hidden_states), *rest)


class NeuronHeronModel(NeuronQwen3MoeModel):
    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        for layer in self.layers:
            layer.mlp = HeronBlock(config, layer.mlp)


class NeuronHeronForCausalLM(NeuronQwen3MoeForCausalLM):
    _model_cls = NeuronHeronModel

    @classmethod
    def get_config_cls(cls) -> type[HeronInferenceConfig]:
        return HeronInferenceConfig

    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
        text = {
            name.removeprefix("language_model."): value
            for name, value in state_dict.items()
            if not name.startswith("visual.")
        }
        return convert_heron_hf_to_neuron_state_dict(text, config)
