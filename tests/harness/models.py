"""Small Hugging Face models on disk, with random weights and sizes that NxDI takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LAYERS = 2
EXPERTS = 8
HIDDEN_SIZE = 64
MOE_INTERMEDIATE_SIZE = 32
SEQUENCE = 16
"""Length of the prompts, and of the bucket that they go through."""

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}


def save_qwen3_moe(
    folder: Path, *, spread: float = 1.0, experts: int = EXPERTS, **settings: Any
) -> Path:
    """Write a Qwen3 MoE, whose output channels differ in magnitude as well.

    Args:
        folder: The folder to write, not there yet.
        spread: The factor between the weights of the smallest and of the largest expert.
        experts: Number of experts in each layer, of which a token goes through two.
        settings: What its config has instead of the small sizes.
    """
    if not transformers.__version__.startswith("4."):
        pytest.skip("NxDI quantizes what transformers 4 holds in memory, each expert by itself")
    torch.manual_seed(2)
    usual = {
        **_COMMON,
        "moe_intermediate_size": MOE_INTERMEDIATE_SIZE,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**usual, **settings}))
    with torch.no_grad():
        for layer in model.model.layers:
            for number, expert in enumerate(getattr(layer.mlp, "experts", ())):
                factor = spread ** (number / (experts - 1)) / spread
                for projection in (expert.gate_proj, expert.up_proj, expert.down_proj):
                    projection.weight.mul_(factor * _of_channels(projection.weight))
    return _save(model, folder)


def save_mixtral(folder: Path, *, spread: float = 1.0, **settings: Any) -> Path:
    """Write a Mixtral; see :func:`save_qwen3_moe`."""
    torch.manual_seed(2)
    usual = {
        **_COMMON,
        "intermediate_size": MOE_INTERMEDIATE_SIZE,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    model = MixtralForCausalLM(MixtralConfig(**{**usual, **settings}))
    with torch.no_grad():
        for layer in model.model.layers:
            for number, expert in enumerate(layer.block_sparse_moe.experts):
                for projection in (expert.w1, expert.w3, expert.w2):
                    projection.weight.mul_(
                        _factor(number, spread) * _of_channels(projection.weight)
                    )
    return _save(model, folder)


def save_llama4(folder: Path, *, spread: float = 1.0, **settings: Any) -> Path:
    """Write a Llama 4 that also sees, as the published ones are; see :func:`save_qwen3_moe`.

    Every second layer has experts, one tensor for all of them, beside one that is shared.
    """
    torch.manual_seed(0)
    text = {
        **_COMMON,
        "intermediate_size": MOE_INTERMEDIATE_SIZE,
        "intermediate_size_mlp": 96,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attn_temperature_tuning": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_hidden_layers": 4,
        **settings,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    }
    tokens = {"boi_token_index": 120, "eoi_token_index": 121, "image_token_index": 122}
    model = Llama4ForConditionalGeneration(
        Llama4Config(text_config=text, vision_config=vision, **tokens)
    )
    with torch.no_grad():
        for layer in model.language_model.model.layers:
            if not hasattr(layer.feed_forward, "experts"):
                continue
            for stacked in (
                layer.feed_forward.experts.gate_up_proj,
                layer.feed_forward.experts.down_proj,
            ):
                for number, expert in enumerate(stacked.normal_(0, 0.1)):
                    expert.mul_(_factor(number, spread))
    return _save(model, folder)


def _save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model; biases, which Hugging Face makes zero, are given random numbers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.5, generator=generator)
    model.save_pretrained(folder)
    return folder


def _of_channels(weight: torch.Tensor) -> torch.Tensor:
    """Magnitudes of output channels from 1/4 to 4, so that a scale at a wrong one shows."""
    return 2 ** (4 * torch.rand(weight.shape[0], 1) - 2)


def _factor(expert: int, spread: float) -> float:
    return spread ** (expert / (EXPERTS - 1)) / spread


def save_qwen3(folder: Path, **settings: Any) -> Path:
    """Write a dense Qwen3, which can draft for the Qwen3 MoE; see :func:`save_qwen3_moe`."""
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**{**_COMMON, **settings}, intermediate_size=96))
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """Read a model with Hugging Face, in float32: the reference."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def prompt() -> torch.Tensor:
    """Tokens as long as the bucket, ``[1, SEQUENCE]``."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, _COMMON["vocab_size"], (1, SEQUENCE), generator=generator)
