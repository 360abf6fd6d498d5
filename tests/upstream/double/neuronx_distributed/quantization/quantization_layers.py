"""The quantized layers: weights in a small type, scales in float32, each with its own loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuronx_distributed.modules.moe.moe_parallel_layers import ExpertFusedLinear, multiply
from neuronx_distributed.parallel_layers.layers import (
    gather_last_axis,
    parallel_parameter,
    set_tensor_model_parallel_attributes,
    sum_over_ranks,
)
from neuronx_distributed.quantization.quantization_config import QuantizationType, QuantizedDtype

_PER_CHANNEL = (
    QuantizationType.PER_CHANNEL_SYMMETRIC,
    QuantizationType.EXPERT_WISE_PER_CHANNEL_SYMMETRIC,
)


def _get_scale_from_state_dict(prefix: str, state_dict: Mapping[str, Any]) -> torch.Tensor:
    if prefix + "scale" not in state_dict:
        raise RuntimeError(f"Cannot find {prefix + 'scale'} in state_dict")
    return state_dict[prefix + "scale"]


def _get_weight_from_state_dict(prefix: str, state_dict: Mapping[str, Any]) -> torch.Tensor:
    if prefix + "weight" not in state_dict:
        raise RuntimeError(f"Cannot find {prefix + 'weight'} in the state_dict")
    return state_dict[prefix + "weight"]


class BaseQuantizeParallelLinear(nn.Module):
    """A quantized layer in the place of a float one, of which it keeps shape and cut.

    Attributes:
        output_axis: The axis of the weight that has a scale for each of its channels.
    """

    output_axis = 0

    def __init__(self, layer: Any, q_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.input_size, self.output_size = layer.input_size, layer.output_size
        self.dtype = layer.dtype
        self.quantization_type = QuantizationType(q_config["quantization_type"])
        self.quantized_dtype = QuantizedDtype(q_config["quantized_dtype"])
        self.activation_quantization_type = q_config["activation_quantization_type"]
        self.clamp_bound = q_config["clamp_bound"]
        if isinstance(layer, ExpertFusedLinear):
            self._n_local_experts = layer._n_local_experts
        cut = layer.weight
        self.weight = parallel_parameter(
            cut.shape, self.quantized_dtype.value, cut.partition_dim, cut.partition_stride
        )
        self.weight.get_tensor_from_state_dict = _get_weight_from_state_dict
        self._setup_for_scale()
        self.scale.get_tensor_from_state_dict = _get_scale_from_state_dict

    def _setup_for_scale(self) -> None:
        shape = [1] * self.weight.ndim if self.quantization_type in _PER_CHANNEL else [1]
        if self.quantization_type in _PER_CHANNEL:
            shape[self.output_axis] = self.weight.shape[self.output_axis]
        if self.quantization_type is QuantizationType.EXPERT_WISE_PER_CHANNEL_SYMMETRIC:
            # The axis has a default in the experts' layers alone.
            assert hasattr(self, "_n_local_experts"), "per_channel_axis cannot be None"
            shape[0] = self._n_local_experts
        self.scale = nn.Parameter(torch.ones(shape), requires_grad=False)
        cut = len(shape) > 1 and self.weight.partition_dim == self.output_axis
        set_tensor_model_parallel_attributes(
            self.scale,
            cut,
            self.output_axis if cut else 0,
            self.weight.partition_stride if cut else 1,
            self.weight.num_partitions if cut else 1,
        )

    @classmethod
    def from_float(cls, mod: nn.Module, q_config: Mapping[str, Any]) -> BaseQuantizeParallelLinear:
        return cls(mod, q_config)

    def _rescaled(self, output: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (output.to(torch.float32) * scale).to(output.dtype)


class QuantizedColumnParallel(BaseQuantizeParallelLinear):
    def __init__(self, layer: Any, q_config: Mapping[str, Any]) -> None:
        super().__init__(layer, q_config)
        self.gather_output = layer.gather_output

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = F.linear(hidden_states, self.weight.to(hidden_states.dtype))
        output = self._rescaled(output, self.scale.flatten())
        return gather_last_axis(output) if self.gather_output else output


class QuantizedRowParallel(BaseQuantizeParallelLinear):
    def __init__(self, layer: Any, q_config: Mapping[str, Any]) -> None:
        super().__init__(layer, q_config)
        self.reduce_output = layer.reduce_output

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = F.linear(hidden_states, self.weight.to(hidden_states.dtype))
        output = self._rescaled(output, self.scale.flatten())
        return sum_over_ranks(output) if self.reduce_output else output


class _QuantizedExperts(BaseQuantizeParallelLinear, ExpertFusedLinear):
    output_axis = 2

    def forward(
        self, hidden_states: torch.Tensor, expert_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight, scale = self.weight, self.scale
        if expert_indices is not None:
            # FP8 cannot be indexed on a CPU; its bytes can.
            weight = weight.view(torch.int8)[expert_indices].view(weight.dtype)
            scale = scale[expert_indices]
        output = multiply(hidden_states, weight.to(hidden_states.dtype))
        return self._rescaled(output, scale.unsqueeze(2) if scale.ndim == 3 else scale)


class QuantizedExpertFusedColumnParallel(_QuantizedExperts):
    """Scale ``[1, 1, out / ranks]``, or ``[E, 1, out / ranks]`` with one for each expert."""


class QuantizedExpertFusedRowParallel(_QuantizedExperts):
    """Scale ``[1, 1, out]``, or ``[E, 1, out]`` with one for each expert; the same on all ranks."""
