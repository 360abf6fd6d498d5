"""Qwen3-Coder-30B: Qwen3 MoE with a config of its own, and NxDI's converter imported by name."""

from __future__ import annotations

from tests.contributions import tiny
from tests.contributions.contribution import Contribution


def _write(model: tiny.Tiny) -> None:
    for path in model.layers(norms=tiny.HEAD):
        model.routed(f"{path}.mlp")


QWEN3_CODER = Contribution(
    name="Qwen3-Coder-30B",
    ref="refs/pull/67/head",
    path="contrib/models/Qwen3-Coder-30B-A3B-Instruct",
    application="modeling_qwen3_coder_moe:NeuronQwen3CoderMoeForCausalLM",
    config={
        **tiny.COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": tiny.EXPERTS,
        "num_experts_per_tok": tiny.CHOSEN,
        "moe_intermediate_size": tiny.INNER,
        "intermediate_size": tiny.DENSE,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    write=_write,
)
