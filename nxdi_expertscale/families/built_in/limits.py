"""The limits of NxDI with the built-in families.

Seen by comparing the logits of NxDI 0.5 to 0.9, which agree, with those of Hugging Face, in float32
and without any quantization (``tests/upstream/test_limits.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nxdi_expertscale.families.config_fields import config_field
from nxdi_expertscale.families.limits import ALWAYS, Effect, Limit


def _normalizes_top_k(config: Any) -> int | None:
    return None if config_field(config, "norm_topk_prob", False) else ALWAYS


def _has_attention_bias(config: Any) -> int | None:
    return ALWAYS if config_field(config, "attention_bias", False) else None


def _scales_rope(config: Any) -> int | None:
    kind = _rope_type(config)
    if kind == "dynamic":
        return int(config_field(config, "max_position_embeddings", 0)) + 1
    return None if kind == "default" else ALWAYS


def _rope_type(config: Any) -> str:
    scaling = _rope_scaling(config)
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _rope_scaling(config: Any) -> Mapping[str, Any]:
    scaling = config_field(config, "rope_scaling")
    return scaling if isinstance(scaling, Mapping) else {}


def _has_rope_of_transformers_5(config: Any) -> int | None:
    rope = config_field(config, "rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    if theta is None or theta == config_field(config, "rope_theta"):
        return None
    return ALWAYS


def _slides_where_asked(config: Any) -> int | None:
    return _slides(config) if config_field(config, "use_sliding_window", False) else None


def _slides(config: Any) -> int | None:
    window = config_field(config, "sliding_window")
    return None if window is None else int(window) + 1


def _has_dense_layers(config: Any) -> int | None:
    step = config_field(config, "decoder_sparse_step", 1)
    dense = config_field(config, "mlp_only_layers") or step != 1
    return ALWAYS if dense else None


def _chooses_one_expert(config: Any) -> int | None:
    return ALWAYS if config_field(config, "num_experts_per_tok", 2) == 1 else None


def _chooses_several_experts(config: Any) -> int | None:
    return ALWAYS if config_field(config, "num_experts_per_tok", 1) != 1 else None


def _ties_embeddings(config: Any) -> int | None:
    whole = config.get("tie_word_embeddings") if isinstance(config, Mapping) else None
    tied = config_field(config, "tie_word_embeddings") is True or whole is True
    return ALWAYS if tied else None


def _has_own_head_dim(config: Any) -> int | None:
    head_dim = config_field(config, "head_dim")
    heads, hidden = (config_field(config, n) for n in ("num_attention_heads", "hidden_size"))
    if None in (head_dim, heads, hidden) or head_dim * heads == hidden:
        return None
    return ALWAYS


def _has_experts_in_other_layers(config: Any) -> int | None:
    layers = config_field(config, "moe_layers")
    step = config_field(config, "interleave_moe_layer_step", 1)
    count = config_field(config, "num_hidden_layers", 0)
    if layers is None or list(layers) == list(range(step - 1, count, step)):
        return None
    return ALWAYS


_LLAMA4_ROPE = {
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
"""What NxD takes for any ``rope_scaling`` (``modules/attention/utils.py``)."""


def _scales_rope_otherwise(config: Any) -> int | None:
    scaling = _rope_scaling(config)
    if not scaling or all(scaling.get(name) == value for name, value in _LLAMA4_ROPE.items()):
        return None
    return ALWAYS


def _tunes_temperature(config: Any) -> int | None:
    if not config_field(config, "attn_temperature_tuning", True):
        return None
    return int(config_field(config, "floor_scale", 8192))


_ROPE_SCALING = Limit(
    field="rope_scaling",
    starts_at=_scales_rope,
    problem="NxDI ignores the model's rope_scaling",
    effect=Effect.WRONG,
    remedy=(
        "for the lengths that the model was trained on, remove rope_scaling from its config.json; "
        "for longer ones, serve it with another engine"
    ),
)
_ROPE_PARAMETERS = Limit(
    field="rope_parameters",
    starts_at=_has_rope_of_transformers_5,
    problem="the config.json was written by transformers 5, and NxDI's transformers 4 ignores its "
    "rope_parameters",
    effect=Effect.WRONG,
    remedy="write rope_theta (and rope_scaling, if there is one) beside rope_parameters",
)
_ONE_EXPERT = Limit(
    field="num_experts_per_tok",
    starts_at=_chooses_one_expert,
    problem="NxD does not know one expert per token (num_experts_per_tok=1) of this model",
    effect=Effect.FAILS,
)
_SHORTER = "use a seq_len of at most {length}"

QWEN3_MOE_LIMITS = (
    Limit(
        field="norm_topk_prob",
        starts_at=_normalizes_top_k,
        problem="NxDI ignores norm_topk_prob=false and normalizes a token's routing weights",
        effect=Effect.WRONG,
    ),
    Limit(
        field="attention_bias",
        starts_at=_has_attention_bias,
        problem="NxDI ignores the biases of attention (attention_bias=true)",
        effect=Effect.WRONG,
    ),
    _ROPE_SCALING,
    _ROPE_PARAMETERS,
    Limit(
        field="use_sliding_window",
        starts_at=_slides_where_asked,
        problem="NxDI ignores the model's sliding_window",
        effect=Effect.WRONG,
        remedy=_SHORTER,
    ),
    Limit(
        field="mlp_only_layers, decoder_sparse_step",
        starts_at=_has_dense_layers,
        problem="NxDI takes every layer for one with experts, and this model has dense ones "
        "(mlp_only_layers, decoder_sparse_step)",
        effect=Effect.FAILS,
    ),
    _ONE_EXPERT,
)

MIXTRAL_LIMITS = (
    Limit(
        field="sliding_window",
        starts_at=_slides,
        problem="NxDI ignores the model's sliding_window",
        effect=Effect.WRONG,
        remedy=_SHORTER,
    ),
    _ROPE_SCALING,
    _ROPE_PARAMETERS,
    Limit(
        field="head_dim",
        starts_at=_has_own_head_dim,
        problem="NxDI ignores head_dim and takes hidden_size / num_attention_heads",
        effect=Effect.FAILS,
    ),
    _ONE_EXPERT,
)

LLAMA4_LIMITS = (
    _ROPE_PARAMETERS,
    Limit(
        field="num_experts_per_tok",
        starts_at=_chooses_several_experts,
        problem="NxDI knows one expert per token of this model alone (num_experts_per_tok=1)",
        effect=Effect.FAILS,
    ),
    Limit(
        field="moe_layers",
        starts_at=_has_experts_in_other_layers,
        problem="NxDI finds the layers with experts by interleave_moe_layer_step, and ignores "
        "moe_layers",
        effect=Effect.FAILS,
    ),
    Limit(
        field="tie_word_embeddings",
        starts_at=_ties_embeddings,
        problem="NxDI does not know tied embeddings (tie_word_embeddings=true) of this model",
        effect=Effect.FAILS,
    ),
    Limit(
        field="rope_scaling",
        starts_at=_scales_rope_otherwise,
        problem="NxD takes other numbers than the model's rope_scaling (factor 8, frequencies "
        "1 to 4, 8192 tokens)",
        effect=Effect.INEXACT,
        remedy="compare answers with the original's where contexts are long",
    ),
    Limit(
        field="attn_temperature_tuning",
        starts_at=_tunes_temperature,
        problem="NxDI ignores attn_temperature_tuning",
        effect=Effect.INEXACT,
        remedy="use a seq_len of at most {length}, or compare answers with the original's",
    ),
)
