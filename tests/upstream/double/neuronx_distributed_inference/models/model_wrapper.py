"""What is traced: a model with its quantized layers in place, and its cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from neuronx_distributed.quantization.quantization_config import (
    ActivationQuantizationType,
    QuantizationType,
    QuantizedDtype,
    get_default_custom_qconfig_dict,
    get_default_expert_wise_per_channel_custom_qconfig_dict,
    get_default_per_channel_custom_qconfig_dict,
)
from neuronx_distributed.quantization.quantize import convert

from neuronx_distributed_inference.models.config import InferenceConfig, NeuronConfig

CONTEXT_ENCODING_MODEL_TAG = "context_encoding_model"
TOKEN_GENERATION_MODEL_TAG = "token_generation_model"

_Q_CONFIGS = {
    QuantizationType.PER_TENSOR_SYMMETRIC: get_default_custom_qconfig_dict,
    QuantizationType.PER_CHANNEL_SYMMETRIC: get_default_per_channel_custom_qconfig_dict,
    QuantizationType.EXPERT_WISE_PER_CHANNEL_SYMMETRIC: (
        get_default_expert_wise_per_channel_custom_qconfig_dict
    ),
}


def get_modules_to_not_convert(neuron_config: NeuronConfig) -> list[str] | None:
    return getattr(neuron_config, "modules_to_not_convert", None)


class ModelWrapper:
    """One graph of a model: its config, with the number of tokens it takes."""

    def __init__(self, config: InferenceConfig, model_cls: Any, tag: str) -> None:
        self.config = config
        self.model_cls = model_cls
        self.tag = tag

    def get_model_instance(self) -> DecoderModelInstance:
        return DecoderModelInstance(model_cls=self.model_cls, config=self.config)


def _float_model(model_cls: Any, config: InferenceConfig, **kwargs: Any) -> torch.nn.Module:
    model = model_cls(config, **kwargs)
    model.eval()
    dtype = config.neuron_config.torch_dtype
    if dtype is not torch.float32:
        model._apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
    return model


class DecoderModelInstance:
    def __init__(self, model_cls: Any, config: InferenceConfig, **kwargs: Any) -> None:
        self.model_cls = model_cls
        self.module: Any = None
        self.input_output_aliases: dict[torch.nn.Parameter, int] = {}
        self.config = config
        self.neuron_config = config.neuron_config
        self.kwargs = kwargs

    def load_module(self) -> None:
        settings = self.neuron_config
        float_model: Any = _float_model(self.model_cls, self.config, **self.kwargs)
        if settings.quantized or settings.is_mlp_quantized():
            q_config = _Q_CONFIGS[QuantizationType(settings.quantization_type)]()
            q_config["quantized_dtype"] = QuantizedDtype.get_dtype(settings.quantization_dtype)
            q_config["activation_quantization_type"] = ActivationQuantizationType(
                settings.activation_quantization_type
            )
            q_config["clamp_bound"] = settings.quantize_clamp_bound
            models = [float_model]
            if settings.enable_fused_speculation:
                models = [float_model.draft_model, float_model.target_model]
            for model in models:
                convert(
                    model,
                    q_config=q_config,
                    inplace=True,
                    mapping=None,
                    modules_to_not_convert=get_modules_to_not_convert(model.config.neuron_config),
                )
        self.module = float_model

    def get(
        self, bucket_rank: int | None, **kwargs: Any
    ) -> tuple[Any, dict[torch.nn.Parameter, int]]:
        """The model, and which outputs of its graph are written to which of its parameters."""
        models = [self.module]
        if self.neuron_config.enable_fused_speculation:
            models = [self.module.draft_model, self.module.target_model]
        states = [state for model in models for state in model.kv_mgr.past_key_values]
        self.input_output_aliases = {state: 1 + place for place, state in enumerate(states)}
        return self.module, self.input_output_aliases


class EncoderModelInstance:
    def __init__(self, model_cls: Any, config: InferenceConfig, **kwargs: Any) -> None:
        self.model_cls = model_cls
        self.module: Any = None
        self.config = config
        self.neuron_config = config.neuron_config
        self.kwargs = kwargs

    def load_module(self) -> None:
        self.module = _float_model(self.model_cls, self.config, **self.kwargs)
        if self.neuron_config.quantized is True:
            q_config = _Q_CONFIGS[QuantizationType(self.neuron_config.quantization_type)]()
            self.module = convert(self.module, q_config=q_config, inplace=True, mapping=None)


def get_trace_callable(
    model_cls: Any, config: InferenceConfig, bucket_rank: int | None = None
) -> tuple[torch.nn.Module, dict[torch.nn.Parameter, int]]:
    config = copy.deepcopy(config)
    model: Any = _float_model(model_cls, config)
    if config.neuron_config.quantized:
        q_config = _Q_CONFIGS[QuantizationType(config.neuron_config.quantization_type)]()
        model = convert(
            model,
            q_config=q_config,
            inplace=True,
            mapping=None,
            modules_to_not_convert=get_modules_to_not_convert(config.neuron_config),
        )
    cache = model.kv_mgr.past_key_values
    return model, {part: 1 + position for position, part in enumerate(cache)}
