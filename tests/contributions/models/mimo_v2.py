"""MiMo-V2-Flash: layers of two kinds of attention, narrower values, block FP8, MTP."""

from __future__ import annotations

import importlib

from tests.contributions import tiny
from tests.contributions.contribution import Contribution

_MODULE = "modeling_mimo_v2"
_KINDS = (0, 1, 1)
"""Of each layer's attention: full, or with a sliding window."""
_HAS_EXPERTS = (0, 1, 1)
_VALUE = 8
"""Width of a head of the values."""


def _write(model: tiny.Tiny) -> None:
    model.ends()
    for layer, (slides, has_experts) in enumerate(zip(_KINDS, _HAS_EXPERTS, strict=True)):
        path = f"model.layers.{layer}"
        model.layer_norms(path)
        attention = f"{path}.self_attn"
        model.linear(f"{attention}.q_proj", tiny.HEADS * tiny.HEAD, tiny.HIDDEN)
        model.linear(f"{attention}.k_proj", tiny.GROUPS * tiny.HEAD, tiny.HIDDEN)
        model.linear(f"{attention}.v_proj", tiny.GROUPS * _VALUE, tiny.HIDDEN)
        model.linear(f"{attention}.o_proj", tiny.HIDDEN, tiny.HEADS * _VALUE)
        if slides:
            model.normal(f"{attention}.attention_sink_bias", tiny.HEADS)
        if not has_experts:
            model.feed_forward(f"{path}.mlp", tiny.DENSE)
            continue
        model.linear(f"{path}.mlp.gate", tiny.EXPERTS, tiny.HIDDEN)
        model.normal(f"{path}.mlp.gate.e_score_correction_bias", tiny.EXPERTS)
        model.experts(f"{path}.mlp.experts")
    model.linear("model.mtp.layers.0.eh_proj", tiny.HIDDEN, 2 * tiny.HIDDEN)
    model.norm("model.mtp.layers.0.enorm", tiny.HIDDEN)


def _prepare() -> None:
    """Let the unquantized model have the router's correction bias too; it has it if quantized."""
    importlib.import_module(_MODULE).NeuronMiMoV2ForCausalLM._apply_router_noaux_tc_fix()


MIMO_V2 = Contribution(
    name="MiMo-V2-Flash",
    ref="refs/pull/137/head",
    path="contrib/models/MiMo-V2-Flash",
    application=f"{_MODULE}:NeuronMiMoV2ForCausalLM",
    config={
        **tiny.COMMON,
        "architectures": ["MiMoV2FlashForCausalLM"],
        "model_type": "mimo_v2_flash",
        "num_hidden_layers": len(_KINDS),
        "hybrid_layer_pattern": list(_KINDS),
        "moe_layer_freq": list(_HAS_EXPERTS),
        "layernorm_epsilon": 1e-5,
        "attention_bias": False,
        "attention_value_scale": 0.707,
        "partial_rotary_factor": 0.5,
        "v_head_dim": _VALUE,
        "sliding_window": 64,
        "swa_head_dim": tiny.HEAD,
        "swa_v_head_dim": _VALUE,
        "swa_num_attention_heads": tiny.HEADS,
        "swa_num_key_value_heads": tiny.GROUPS,
        "swa_rope_theta": 10000.0,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "n_routed_experts": tiny.EXPERTS,
        "num_experts_per_tok": tiny.CHOSEN,
        "moe_intermediate_size": tiny.INNER,
        "intermediate_size": tiny.DENSE,
        # The contribution's own name for it, beside the published one.
        "dense_intermediate_size": tiny.DENSE,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
    },
    write=_write,
    blocks=True,
    kept_in_blocks=("o_proj",),
    prepare=_prepare,
)
