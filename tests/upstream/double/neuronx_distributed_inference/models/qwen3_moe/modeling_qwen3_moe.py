"""Qwen3 MoE. Its converter fuses the experts' weights, and knows nothing of their scales."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3MoeForCausalLM

from neuronx_distributed_inference.models.config import (
    SHARD_ON_INTERMEDIATE_DIMENSION_PER_TP,
    InferenceConfig,
    MoENeuronConfig,
)
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.modules.moe_v2 import initialize_moe_module


def _fuse_qkv(state_dict: dict[str, Any], config: Any, layer: int) -> None:
    attention = f"layers.{layer}.self_attn"
    suffixes = ["weight"]
    excluded = config.neuron_config.modules_to_not_convert or []
    if config.neuron_config.quantized and attention not in excluded:
        suffixes.append("scale")
    for suffix in suffixes:
        parts = [state_dict.pop(f"{attention}.{name}_proj.{suffix}") for name in "qkv"]
        state_dict[f"{attention}.Wqkv.{suffix}"] = torch.cat(parts)


def _fused_weight(
    state_dict: dict[str, Any], config: Any, layer: int, projection: str
) -> torch.Tensor:
    """One projection of all experts, ``[E, in, out]``."""
    keys = [
        f"layers.{layer}.mlp.experts.{expert}.{projection}.weight"
        for expert in range(config.num_experts)
    ]
    out, inputs = state_dict[keys[0]].shape
    fused = torch.empty(len(keys), inputs, out, dtype=state_dict[keys[0]].dtype)
    for expert, key in enumerate(keys):
        fused.narrow(0, expert, 1).copy_(state_dict.pop(key).T.detach().clone())
    return fused


def convert_qwen3_moe_hf_to_neuron_state_dict(
    neuron_state_dict: dict[str, Any], config: Any
) -> dict[str, Any]:
    assert config.neuron_config.glu_mlp is True, "Only GLU MLP is supported"
    ranks = torch.arange(config.neuron_config.tp_degree, dtype=torch.int32)
    neuron_state_dict["rank_util.rank"] = ranks
    pad = getattr(config, "moe_intermediate_pad_size", 0)
    for layer in range(config.num_hidden_layers):
        block = f"layers.{layer}"
        neuron_state_dict[f"{block}.self_attn.rank_util.rank"] = ranks.clone()
        for name in ("q", "k"):
            weight = neuron_state_dict.pop(f"{block}.self_attn.{name}_norm.weight")
            neuron_state_dict[f"{block}.self_attn.{name}_layernorm.weight"] = weight
        router = neuron_state_dict.pop(f"{block}.mlp.gate.weight")
        neuron_state_dict[f"{block}.mlp.router.linear_router.weight"] = router
        gate, up, down = (
            _fused_weight(neuron_state_dict, config, layer, name)
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        fused = f"{block}.mlp.expert_mlps.mlp_op"
        neuron_state_dict[f"{fused}.gate_up_proj.weight"] = torch.cat(
            [_padded(gate, (0, pad)), _padded(up, (0, pad))], dim=2
        )
        neuron_state_dict[f"{fused}.down_proj.weight"] = _padded(down, (0, 0, 0, pad))
        if config.neuron_config.fused_qkv:
            _fuse_qkv(neuron_state_dict, config, layer)
    return neuron_state_dict


def _padded(weight: torch.Tensor, amounts: tuple[int, ...]) -> torch.Tensor:
    return F.pad(weight, amounts) if any(amounts) else weight


class Qwen3MoeInferenceConfig(InferenceConfig):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_local_experts = self.num_experts
        self.n_shared_experts = 0
        self.maybe_pad_intermediate()
        self.intermediate_size = self.moe_intermediate_size
        self.neuron_config.router_config.dtype = torch.float32
        self.neuron_config.router_config.act_fn = "softmax"
        self.neuron_config.normalize_top_k_affinities = True

    def maybe_pad_intermediate(self) -> None:
        settings = self.neuron_config
        if not settings.blockwise_matmul_config.use_shard_on_intermediate_dynamic_while:
            return
        unit = SHARD_ON_INTERMEDIATE_DIMENSION_PER_TP * settings.moe_tp_degree
        padded = math.ceil(self.moe_intermediate_size / unit) * unit
        if padded != self.moe_intermediate_size:
            self.moe_intermediate_pad_size = padded - self.moe_intermediate_size
            self.moe_intermediate_size = padded

    def get_required_attributes(self) -> list[str]:
        return [
            "head_dim",
            "hidden_size",
            "moe_intermediate_size",
            "norm_topk_prob",
            "num_experts",
            "num_experts_per_tok",
            "num_hidden_layers",
            "vocab_size",
        ]

    @classmethod
    def get_neuron_config_cls(cls) -> type[MoENeuronConfig]:
        return MoENeuronConfig


class NeuronQwen3MoeModel(NeuronBaseModel):
    def feed_forward(self, config: Any) -> nn.Module:
        return initialize_moe_module(config)


class NeuronQwen3MoeForCausalLM(NeuronBaseForCausalLM):
    _model_cls = NeuronQwen3MoeModel

    @classmethod
    def get_config_cls(cls) -> type[InferenceConfig]:
        return Qwen3MoeInferenceConfig

    @staticmethod
    def load_hf_model(model_path: str) -> Any:
        return Qwen3MoeForCausalLM.from_pretrained(model_path)

    @staticmethod
    def convert_hf_to_neuron_state_dict(
        state_dict: dict[str, Any], config: InferenceConfig
    ) -> dict[str, Any]:
        return convert_qwen3_moe_hf_to_neuron_state_dict(state_dict, config)
