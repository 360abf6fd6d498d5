"""NxDI's own limits: which configs reach them, and from which length on.

What NxDI does is shown on the real sources by ``tests/upstream/test_limits.py``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nxdi_expertscale.families.built_in import OF_NXDI
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.limits import ALWAYS, Effect, Limit

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True, "num_experts_per_tok": 8, "head_dim": 128},
    "mixtral": {
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "head_dim": None,
    },
    "llama4": {
        "num_experts_per_tok": 1,
        "attn_temperature_tuning": False,
        "num_hidden_layers": 48,
        "interleave_moe_layer_step": 2,
    },
}
"""What NxDI runs rightly."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
SCOUT = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
NXD = {**SCOUT, "factor": 8.0, "high_freq_factor": 4.0}

TRANSFORMERS_5 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}

REACHED: dict[tuple[str, str], list[tuple[dict[str, Any], int]]] = {
    ("qwen3_moe", "norm_topk_prob"): [({"norm_topk_prob": False}, ALWAYS)],
    ("qwen3_moe", "attention_bias"): [({"attention_bias": True}, ALWAYS)],
    ("qwen3_moe", "rope_scaling"): [
        ({"rope_scaling": YARN}, ALWAYS),
        ({"rope_scaling": DYNAMIC, "max_position_embeddings": 4096}, 4097),
    ],
    ("qwen3_moe", "use_sliding_window"): [
        ({"use_sliding_window": True, "sliding_window": 4096}, 4097)
    ],
    ("qwen3_moe", "mlp_only_layers, decoder_sparse_step"): [
        ({"mlp_only_layers": [0]}, ALWAYS),
        ({"decoder_sparse_step": 2}, ALWAYS),
    ],
    ("qwen3_moe", "num_experts_per_tok"): [({"num_experts_per_tok": 1}, ALWAYS)],
    ("mixtral", "sliding_window"): [({"sliding_window": 4096}, 4097)],
    ("mixtral", "rope_scaling"): [({"rope_scaling": YARN}, ALWAYS)],
    **{
        (family, "rope_parameters"): [
            (TRANSFORMERS_5, ALWAYS),
            ({**TRANSFORMERS_5, "rope_theta": 1e4}, ALWAYS),
        ]
        for family in ("qwen3_moe", "mixtral", "llama4")
    },
    ("mixtral", "head_dim"): [({"head_dim": 256}, ALWAYS)],
    ("mixtral", "num_experts_per_tok"): [({"num_experts_per_tok": 1}, ALWAYS)],
    ("llama4", "num_experts_per_tok"): [({"num_experts_per_tok": 2}, ALWAYS)],
    ("llama4", "moe_layers"): [({"moe_layers": [0, 3]}, ALWAYS)],
    ("llama4", "tie_word_embeddings"): [({"tie_word_embeddings": True}, ALWAYS)],
    ("llama4", "rope_scaling"): [({"rope_scaling": SCOUT}, ALWAYS)],
    ("llama4", "attn_temperature_tuning"): [
        ({"attn_temperature_tuning": 4, "floor_scale": 4096}, 4096),
        ({"attn_temperature_tuning": True}, 8192),
    ],
}
"""For each limit, what a config asks for to reach it, and from which length on it counts."""

NOT_REACHED: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {},
        # Made right where it is loaded: loading/tied_embeddings.py.
        {"tie_word_embeddings": True},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": None},
        {**TRANSFORMERS_5, "rope_theta": 1e6},
        {"use_sliding_window": False, "sliding_window": 4096},
        {"use_sliding_window": True, "sliding_window": None},
        {"mlp_only_layers": [], "decoder_sparse_step": 1},
    ],
    "mixtral": [{}, {"head_dim": 128}],
    "llama4": [{}, {"moe_layers": list(range(1, 48, 2))}, {"rope_scaling": NXD}],
}

EVERY = [
    pytest.param(family, limit, id=f"{family.name}: {limit.field}")
    for family in OF_NXDI
    for limit in family.limits
]


@pytest.mark.parametrize(("family", "limit"), EVERY)
@pytest.mark.parametrize("form", ["json", "nested json", "object"])
def test_limit_is_reached_by_what_asks_for_it(family: MoEFamily, limit: Limit, form: str) -> None:
    assert REACHED.get((family.name, limit.field)), "a limit needs a config that reaches it"
    for asked, starts_at in REACHED[family.name, limit.field]:
        fields = {**CONFIGS[family.name], **asked}
        config: Any = fields
        if form == "nested json":
            config = {"model_type": "other", "text_config": fields}
        elif form == "object":
            config = SimpleNamespace(**fields)

        (reached,) = family.limits_of(config)

        assert reached.limit is limit
        assert reached.starts_at == starts_at
        assert "a limit of NxDI itself" in reached.problem
        assert (f"from {starts_at} tokens on" in reached.problem) is (starts_at != ALWAYS)
        assert "{" not in reached.problem + reached.remedy


@pytest.mark.parametrize("family", OF_NXDI, ids=lambda family: family.name)
def test_limits_are_not_reached_by_what_nxdi_runs_rightly(family: MoEFamily) -> None:
    for asked in NOT_REACHED[family.name]:
        assert family.limits_of({**CONFIGS[family.name], **asked}) == ()


PUBLISHED = [
    (
        "Qwen3-30B-A3B",
        {
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
    ),
    (
        "Mixtral-8x7B-Instruct-v0.1",
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_local_experts": 8,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
]


@pytest.mark.parametrize(("model", "config"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_published_models_reach_no_limit(model: str, config: dict[str, Any]) -> None:
    (family,) = (one for one in OF_NXDI if config["model_type"] in one.model_types)

    assert family.limits_of(config) == ()


def test_missing_fields_have_hugging_faces_defaults() -> None:
    qwen3_moe, mixtral, llama4 = OF_NXDI

    # Qwen3MoeConfig() does not normalize; Llama4TextConfig() tunes the temperature.
    assert [reached.limit.field for reached in qwen3_moe.limits_of({})] == ["norm_topk_prob"]
    assert mixtral.limits_of({}) == ()
    assert [reached.limit.field for reached in llama4.limits_of({})] == ["attn_temperature_tuning"]


def test_what_is_off_by_less_than_fp8_is_inexact_and_nothing_else() -> None:
    inexact = {
        (family.name, limit.field)
        for family in OF_NXDI
        for limit in family.limits
        if limit.effect is Effect.INEXACT
    }

    assert inexact == {("llama4", "rope_scaling"), ("llama4", "attn_temperature_tuning")}
