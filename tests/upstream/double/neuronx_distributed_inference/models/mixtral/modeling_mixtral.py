"""Mixtral. Its converter fuses the experts' weights, and knows nothing of their scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import MixtralForCausalLM

from neuronx_distributed_inference.models.config import InferenceConfig, MoENeuronConfig
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.moe import initialize_moe_module


def _fused_weight(weights: list[torch.Tensor]) -> torch.Tensor:
    """One projection of all experts, ``[E, in, out]``."""
    out, inputs = weights[0].shape
    fused = torch.empty(len(weights), inputs, out, dtype=weights[0].dtype)
    for expert, weight in enumerate(weights):
        fused[expert] = weight.T
    return fused


def convert_mixtral_to_neuron_state_dict(
    neuron_state_dict: dict[str, Any], config: Any
) -> dict[str, Any]:
    assert config.neuron_config.glu_mlp is True, "Only GLU MLP is supported"
    ranks = torch.arange(config.neuron_config.tp_degree, dtype=torch.int32)
    neuron_state_dict["rank_util.rank"] = ranks
    for layer in range(config.num_hidden_layers):
        block, fused = f"layers.{layer}.block_sparse_moe", f"layers.{layer}.mlp.expert_mlps.mlp_op"
        router = neuron_state_dict.pop(f"{block}.gate.weight")
        neuron_state_dict[f"layers.{layer}.mlp.router.linear_router.weight"] = router
        neuron_state_dict[f"layers.{layer}.self_attn.rank_util.rank"] = ranks.clone()
        gate, up, down = (
            _fused_weight(
                [
                    neuron_state_dict.pop(f"{block}.experts.{expert}.{name}.weight")
                    for expert in range(config.num_local_experts)
                ]
            )
            for name in ("w1", "w3", "w2")
        )
        neuron_state_dict[f"{fused}.gate_up_proj.weight"] = torch.cat([gate, up], dim=2)
        neuron_state_dict[f"{fused}.down_proj.weight"] = down
    return neuron_state_dict


class MixtralInferenceConfig(InferenceConfig):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention_head_dim = self.hidden_size // self.num_attention_heads

    def get_required_attributes(self) -> list[str]:
        return [
            "hidden_size",
            "num_experts_per_tok",
            "num_hidden_layers",
            "num_local_experts",
            "vocab_size",
        ]

    @classmethod
    def get_neuron_config_cls(cls) -> type[MoENeuronConfig]:
        return MoENeuronConfig


class NeuronMixtralModel(NeuronBaseModel):
    qk_norm = False

    def feed_forward(self, config: Any) -> nn.Module:
        return initialize_moe_module(
            config,
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            normalize_top_k_affinities=config.neuron_config.normalize_top_k_affinities,
        )


class NeuronMixtralForCausalLM(NeuronBaseForCausalLM):
    _model_cls = NeuronMixtralModel

    @classmethod
    def get_config_cls(cls) -> type[InferenceConfig]:
        return MixtralInferenceConfig

    @staticmethod
    def load_hf_model(model_path: str) -> Any:
        return MixtralForCausalLM.from_pretrained(model_path)

    @staticmethod
    def convert_hf_to_neuron_state_dict(
        state_dict: dict[str, Any], config: InferenceConfig
    ) -> dict[str, Any]:
        return convert_mixtral_to_neuron_state_dict(state_dict, config)
