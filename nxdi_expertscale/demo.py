"""``nxdi-expertscale demo``: a small model, quantized, and what one shared scale makes of it."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nxdi_expertscale import decoder
from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.checkpoint.source import CONFIG, SINGLE_FILE, open_checkpoint
from nxdi_expertscale.checkpoint.weights import StoredWeights, with_averaged_scales
from nxdi_expertscale.families import QWEN3_MOE

LAYERS = 4
EXPERTS = 16
SPREAD = 16.0
"""Factor between the magnitudes of the smallest and of the largest expert."""

TOKENS = 256

_CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class LayerErrors:
    """Error of one layer's MoE output, as a share of the original's norm."""

    layer: int
    expert_wise: float
    averaged: float


@dataclass(frozen=True)
class Demo:
    """What the demo found."""

    layers: tuple[LayerErrors, ...]


def run() -> Demo:
    """Make a checkpoint whose experts differ in magnitude, quantize it, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        original, quantized = Path(folder, "original"), Path(folder, "fp8")
        _save_model(original)
        quantize_checkpoint(original, quantized)
        return _layer_errors(original, quantized)


def _save_model(folder: Path) -> None:
    model = decoder.read_architecture(_CONFIG, QWEN3_MOE, CONFIG)
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in model.shapes().items():
        place = QWEN3_MOE.parse_expert_key(name)
        exponent = 0.0 if place is None else place.expert / (EXPERTS - 1) - 1
        values = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        weights[name if name == decoder.LM_HEAD else f"model.{name}"] = (
            values * SPREAD**exponent
        ).to(torch.bfloat16)
    folder.mkdir()
    save_file(weights, folder / SINGLE_FILE)
    (folder / CONFIG).write_text(json.dumps(_CONFIG))


def _layer_errors(original: Path, quantized: Path) -> Demo:
    model = decoder.read_architecture(_CONFIG, QWEN3_MOE, CONFIG)
    inputs = torch.randn(TOKENS, model.hidden_size, generator=torch.Generator().manual_seed(1))
    with (
        StoredWeights(open_checkpoint(original), QWEN3_MOE) as full,
        StoredWeights(open_checkpoint(quantized), QWEN3_MOE) as expert_wise,
    ):
        averaged = with_averaged_scales(expert_wise, model)
        errors = []
        for layer in range(LAYERS):
            expected, *found = (
                decoder.feed_forward(inputs, weights, layer, model)
                for weights in (full, expert_wise, averaged)
            )
            errors.append(
                LayerErrors(layer, *(float((f - expected).norm() / expected.norm()) for f in found))
            )
        return Demo(tuple(errors))
