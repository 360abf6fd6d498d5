"""Experts that are built from the neuron config's settings for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from neuronx_distributed.modules.moe.model import ExpertMLPsV2, MoE, RouterTopK
from torch import nn


def initialize_moe_module(
    config: Any, block: Callable[[Any], nn.Module] | None = None
) -> nn.Module:
    """Build the experts of a layer, by ``block`` where a model has its own kind of them."""
    if block is not None:
        return block(config)
    settings = config.neuron_config
    sizes = (config.num_local_experts, config.num_experts_per_tok, config.hidden_size)
    return MoE(
        RouterTopK(*sizes, settings.router_config.dtype),
        ExpertMLPsV2(
            *sizes,
            config.intermediate_size,
            settings.torch_dtype,
            settings.normalize_top_k_affinities,
        ),
    )
