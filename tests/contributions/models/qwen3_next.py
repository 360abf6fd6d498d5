"""Qwen3-Coder-Next and Qwen3-Next: gated DeltaNet in three of four layers, gated attention."""

from __future__ import annotations

import importlib

import torch

from tests.contributions import tiny
from tests.contributions.contribution import Contribution

_MODULE = "modeling_qwen35_moe"
KINDS = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
"""Of each layer's attention; the contribution knows this sequence alone."""
KEY_HEADS, VALUE_HEADS, STATE = 2, 4, 16
KERNEL = 4

DELTA_CONFIG = {
    "num_hidden_layers": len(KINDS),
    "layer_types": list(KINDS),
    "full_attention_interval": len(KINDS),
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "linear_key_head_dim": STATE,
    "linear_value_head_dim": STATE,
    "linear_conv_kernel_dim": KERNEL,
    "num_experts": tiny.EXPERTS,
    "num_experts_per_tok": tiny.CHOSEN,
    "moe_intermediate_size": tiny.INNER,
    "shared_expert_intermediate_size": tiny.INNER,
    "partial_rotary_factor": 0.5,
}


def write_norm(model: tiny.Tiny, path: str, size: int) -> None:
    """The weight of a norm to which one is added."""
    model.normal(f"{path}.weight", size, deviation=0.1)


def write_gated_attention(model: tiny.Tiny, path: str) -> None:
    """Grouped-query attention whose queries have a gate beside them."""
    model.linear(f"{path}.q_proj", 2 * tiny.HEADS * tiny.HEAD, tiny.HIDDEN)
    model.linear(f"{path}.k_proj", tiny.GROUPS * tiny.HEAD, tiny.HIDDEN)
    model.linear(f"{path}.v_proj", tiny.GROUPS * tiny.HEAD, tiny.HIDDEN)
    model.linear(f"{path}.o_proj", tiny.HIDDEN, tiny.HEADS * tiny.HEAD)
    write_norm(model, f"{path}.q_norm", tiny.HEAD)
    write_norm(model, f"{path}.k_norm", tiny.HEAD)


def write_delta(model: tiny.Tiny, path: str) -> None:
    """What is around the projections into gated DeltaNet."""
    inner = VALUE_HEADS * STATE
    model.normal(f"{path}.conv1d.weight", 2 * KEY_HEADS * STATE + inner, 1, KERNEL, deviation=0.5)
    model.normal(f"{path}.A_log", VALUE_HEADS, deviation=0.5)
    model.tensors[f"{path}.dt_bias"] = torch.ones(VALUE_HEADS)
    model.norm(f"{path}.norm", STATE)
    model.linear(f"{path}.out_proj", tiny.HIDDEN, inner)


def write_shared(model: tiny.Tiny, path: str) -> None:
    """The shared expert of a MoE block, and its gate."""
    model.feed_forward(f"{path}.shared_expert", tiny.INNER, factor=0.25)
    model.linear(f"{path}.shared_expert_gate", 1, tiny.HIDDEN)


def _write(model: tiny.Tiny) -> None:
    model.ends()
    write_norm(model, "model.norm", tiny.HIDDEN)
    for layer, kind in enumerate(KINDS):
        path = f"model.layers.{layer}"
        write_norm(model, f"{path}.input_layernorm", tiny.HIDDEN)
        write_norm(model, f"{path}.post_attention_layernorm", tiny.HIDDEN)
        if kind == "full_attention":
            write_gated_attention(model, f"{path}.self_attn")
        else:
            delta = f"{path}.linear_attn"
            write_delta(model, delta)
            both = 2 * (KEY_HEADS + VALUE_HEADS) * STATE
            model.linear(f"{delta}.in_proj_qkvz", both, tiny.HIDDEN)
            model.linear(f"{delta}.in_proj_ba", 2 * VALUE_HEADS, tiny.HIDDEN)
        model.routed(f"{path}.mlp")
        write_shared(model, f"{path}.mlp")
    model.linear("mtp.fc", tiny.HIDDEN, 2 * tiny.HIDDEN)
    write_norm(model, "mtp.norm", tiny.HIDDEN)


def _prepare() -> None:
    """Let a CPU have its recurrence over a context in PyTorch, and not by its kernel."""
    delta = importlib.import_module(_MODULE).NeuronGatedDeltaNet

    def forward(self: torch.nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return delta._chunk_forward(self, *inputs, output_final_state=True)

    delta._nki_recurrent_forward = forward


QWEN3_CODER_NEXT = Contribution(
    name="Qwen3-Coder-Next",
    ref="refs/pull/170/head",
    path="contrib/models/Qwen3-Coder-Next",
    application=f"{_MODULE}:NeuronQwen35MoeForCausalLM",
    config={
        **tiny.COMMON,
        **DELTA_CONFIG,
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "intermediate_size": tiny.DENSE,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    write=_write,
    prepare=_prepare,
)
