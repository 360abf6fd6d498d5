"""Tiny checkpoints on disk, in every form that ``quantize`` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYERS = 2
EXPERTS = 4
HIDDEN = 48
INNER = 40
VOCABULARY = 64
BLOCK = 16
"""Block of the FP8 checkpoints; neither size of an expert is a multiple of it and of each other."""

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

Tensors = dict[str, torch.Tensor]


def tensors(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The weights of a small Qwen3 MoE whose experts differ in magnitude."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 8

    found = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{norm}.weight"] = random(HIDDEN) + 1
        for head_norm in ("q_norm", "k_norm"):
            found[f"{prefix}.self_attn.{head_norm}.weight"] = random(16) + 1
        for projection, out, inputs in (
            ("q_proj", 64, HIDDEN),
            ("k_proj", 32, HIDDEN),
            ("v_proj", 32, HIDDEN),
            ("o_proj", HIDDEN, 64),
        ):
            found[f"{prefix}.self_attn.{projection}.weight"] = random(out, inputs)
        found[f"{prefix}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            experts = f"{prefix}.mlp.experts.{expert}"
            for projection in ("gate_proj", "up_proj"):
                found[f"{experts}.{projection}.weight"] = random(INNER, HIDDEN) * 4**expert
            found[f"{experts}.down_proj.weight"] = random(HIDDEN, INNER) * 4**expert
    found["model.norm.weight"] = random(HIDDEN) + 1
    found["lm_head.weight"] = random(VOCABULARY, HIDDEN)
    return {name: value.to(dtype) for name, value in found.items()}


def is_linear(name: str) -> bool:
    return name == "lm_head.weight" or "_proj" in name


def in_blocks(values: Tensors) -> Tensors:
    """The linear layers as FP8 in blocks, as Hugging Face's ``fp8`` checkpoints have them."""

    def quantize(weight: torch.Tensor) -> Tensors:
        out, inputs = weight.shape
        scale = torch.empty(-(-out // BLOCK), -(-inputs // BLOCK))
        quantized = torch.empty(out, inputs, dtype=torch.float8_e4m3fn)
        for row in range(scale.shape[0]):
            for column in range(scale.shape[1]):
                at = (
                    slice(row * BLOCK, (row + 1) * BLOCK),
                    slice(column * BLOCK, (column + 1) * BLOCK),
                )
                scale[row, column] = weight[at].float().abs().max() / 448
                quantized[at] = (weight[at].float() / scale[row, column]).to(torch.float8_e4m3fn)
        return {"weight": quantized, "weight_scale_inv": scale}

    return _quantized(values, quantize)


def by_channel(values: Tensors) -> Tensors:
    """The linear layers as FP8 with a scale for each channel, in the range of GPUs."""

    def quantize(weight: torch.Tensor) -> Tensors:
        scale = weight.float().abs().amax(dim=1, keepdim=True) / 448
        quantized = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {"weight": quantized, "weight_scale": scale.to(torch.bfloat16)}

    return _quantized(values, quantize)


def by_tensor(values: Tensors) -> Tensors:
    """The linear layers as FP8 with one scale for each tensor."""

    def quantize(weight: torch.Tensor) -> Tensors:
        scale = weight.float().abs().max().reshape(1) / 448
        return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale}

    return _quantized(values, quantize)


def _quantized(values: Tensors, quantize: Callable[[torch.Tensor], Tensors]) -> Tensors:
    found: Tensors = {}
    for name, value in values.items():
        if is_linear(name):
            module = name.removesuffix(".weight")
            found |= {f"{module}.{kind}": part for kind, part in quantize(value).items()}
        else:
            found[name] = value
    return found


BLOCKS_CONFIG = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
COMPRESSED_CONFIG = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def save(
    folder: Path,
    values: Tensors | None = None,
    *,
    shards: int = 3,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint; with one shard it is a single file without an index.

    Args:
        folder: The folder to write.
        values: The tensors; :func:`tensors` by default.
        shards: Number of files.
        config: What differs from :data:`CONFIG`.
    """
    values = tensors() if values is None else values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "generation_config.json").write_text("{}")
    if shards == 1:
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(values)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        # Scattered, so that a weight and its scale may lie in different files.
        part = {name: values[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, as the safetensors library reads it."""
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
