"""Qwen3-Coder-480B: NxDI's own Qwen3 MoE with the settings of its contribution, block FP8."""

from __future__ import annotations

from tests.contributions.contribution import Contribution
from tests.contributions.models.qwen3_coder import QWEN3_CODER

QWEN3_CODER_480B = Contribution(
    name="Qwen3-Coder-480B",
    ref="refs/pull/66/head",
    path="contrib/models/Qwen3-Coder-480B-A35B-Instruct",
    application=(
        "neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe"
        ":NeuronQwen3MoeForCausalLM"
    ),
    config=QWEN3_CODER.config,
    write=QWEN3_CODER.write,
    blocks=True,
    settings={"fused_qkv": True},
)
