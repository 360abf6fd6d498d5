"""Experts that are built without the neuron config's settings for them."""

from __future__ import annotations

from typing import Any

from neuronx_distributed.modules.moe.model import ExpertMLPsV2, MoE, RouterTopK


def initialize_moe_module(
    config: Any,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    normalize_top_k_affinities: bool = True,
) -> MoE:
    dtype = config.neuron_config.torch_dtype
    sizes = (num_experts, top_k, hidden_size)
    return MoE(
        RouterTopK(*sizes, dtype),
        ExpertMLPsV2(*sizes, intermediate_size, dtype, normalize_top_k_affinities),
    )
