"""A small double of the contribution's converter: what it does with experts and attention."""

from __future__ import annotations

from typing import Any

import torch


def convert_qwen35_hf_to_neuron_state_dict(
    neuron_state_dict: dict[str, Any], config: Any
) -> dict[str, Any]:
    for layer in range(config.num_hidden_layers):
        block = f"layers.{layer}.mlp"
        fused = f"{block}.moe.expert_mlps.mlp_op"
        for name in ("gate_up_proj", "down_proj"):
            weight = neuron_state_dict.pop(f"{block}.experts.{name}")
            neuron_state_dict[f"{fused}.{name}.weight"] = weight.transpose(1, 2).contiguous()
        attention = f"layers.{layer}.self_attn"
        for suffix in ("weight", "scale"):
            parts = [neuron_state_dict.pop(f"{attention}.{name}_proj.{suffix}") for name in "qkv"]
            neuron_state_dict[f"{attention}.Wqkv.{suffix}"] = torch.cat(parts)
        router = neuron_state_dict.pop(f"{block}.gate.weight")
        neuron_state_dict[f"{block}.moe.router.linear_router.weight"] = router
    return neuron_state_dict


class NeuronQwen35ForCausalLM:
    @staticmethod
    def convert_hf_to_neuron_state_dict(state_dict: dict[str, Any], config: Any) -> dict[str, Any]:
        text = {name.removeprefix("language_model."): value for name, value in state_dict.items()}
        return convert_qwen35_hf_to_neuron_state_dict(text, config)
