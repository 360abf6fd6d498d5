"""MiniMax-M2: ``block_sparse_moe`` with w1, w3 and w2, norms as wide as all heads, block FP8."""

from __future__ import annotations

import torch

from tests.contributions import tiny
from tests.contributions.contribution import Contribution


def _write(model: tiny.Tiny) -> None:
    model.ends()
    for layer in range(tiny.LAYERS):
        path = f"model.layers.{layer}"
        model.layer_norms(path)
        model.attention(f"{path}.self_attn")
        model.norm(f"{path}.self_attn.q_norm", tiny.HEADS * tiny.HEAD)
        model.norm(f"{path}.self_attn.k_norm", tiny.GROUPS * tiny.HEAD)
        model.linear(f"{path}.block_sparse_moe.gate", tiny.EXPERTS, tiny.HIDDEN)
        model.normal(f"{path}.block_sparse_moe.e_score_correction_bias", tiny.EXPERTS)
        model.experts(f"{path}.block_sparse_moe.experts", names=("w1", "w3", "w2"))


def _prepare() -> None:
    """Give its norms of queries and keys, which call the device in any case, a CPU's."""
    from neuronx_distributed_inference.modules import custom_calls

    def apply(
        hidden_states: torch.Tensor, weight: torch.Tensor, epsilon: float, _: int
    ) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, epsilon)

    custom_calls.RmsNorm.apply = apply


MINIMAX_M2 = Contribution(
    name="MiniMax-M2",
    ref="refs/pull/138/head",
    path="contrib/models/MiniMax-M2",
    application="src.modeling_minimax_m2:NeuronMiniMaxM2ForCausalLM",
    root=".",
    config={
        **tiny.COMMON,
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "num_local_experts": tiny.EXPERTS,
        "num_experts_per_tok": tiny.CHOSEN,
        "intermediate_size": tiny.INNER,
        "rotary_dim": tiny.HEAD // 2,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "use_routing_bias": True,
        "scoring_func": "sigmoid",
    },
    write=_write,
    blocks=True,
    prepare=_prepare,
)
