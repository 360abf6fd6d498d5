"""NxDI's two configs as the settings read them: objects that hold nothing but attributes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.settings.settings import Settings, Upstream, read_settings


class NeuronConfig(SimpleNamespace):
    """NxDI's config for any model."""


class MoENeuronConfig(NeuronConfig):
    """NxDI's config for a model with experts."""


def neuron_config(cls: type[NeuronConfig] = MoENeuronConfig, **changes: Any) -> Any:
    """One with the flag, quantized as it has to be."""
    usual = {
        "expert_wise_scale": True,
        "quantized": True,
        "quantization_type": "per_channel_symmetric",
        "quantization_dtype": "f8e4m3",
        "seq_len": 4096,
        "max_context_length": 4096,
    }
    return cls(**{**usual, **changes})


def model_config(**changes: Any) -> Any:
    """Qwen3-30B-A3B's, as far as settings read it."""
    usual = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    }
    return SimpleNamespace(**{**usual, **changes})


def settings(
    neuron: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    upstream: Upstream | None = None,
    *,
    cls: type[NeuronConfig] = MoENeuronConfig,
    alone: bool = False,
) -> Settings:
    """The settings of the usual configs, but for some changes.

    Args:
        neuron: What differs in the neuron config.
        model: What differs in the model's config.
        upstream: What the release does; by default what a new one does on a CPU.
        cls: Class of the neuron config.
        alone: Whether the neuron config is looked at alone.
    """
    of_model = None if alone else model_config(**(model or {}))
    found = read_settings(neuron_config(cls, **(neuron or {})), of_model, BUILT_IN)
    return dataclasses.replace(found, upstream=upstream or Upstream())
