"""What NxDI itself does not do as a model's config asks: seen against Hugging Face, and refused.

Without quantization and without the flag, in float32: it is NxDI's own, and a release that no
longer has a limit fails here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nxdi_expertscale import ConfigurationError, quantize_checkpoint
from nxdi_expertscale.checkpoint import neuron_settings
from nxdi_expertscale.errors import ExpertScaleError
from nxdi_expertscale.families.built_in import OF_NXDI
from nxdi_expertscale.families.limits import Effect
from tests.harness import models
from tests.harness.targets import Target

ROUNDING = 1e-4
"""Llama 4's norms of queries and keys add 2e-5."""
FP8 = 0.06
"""What FP8 costs a layer, at most."""

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}
SCOUT = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
LONG_WAVES = {"head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 131072}
"""Llama 4's, which its rope_scaling is about."""


class Case(NamedTuple):
    """A model whose config asks for something.

    Attributes:
        family: Its family.
        fields: What its config asks for.
        field: The field of the limit that it reaches; None where NxDI runs it rightly.
    """

    family: str
    fields: dict[str, Any]
    field: str | None = None

    def __str__(self) -> str:
        return f"{self.family} {self.fields or 'as it is'}"


CASES = [
    Case("qwen3_moe", {}),
    Case("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    Case("qwen3_moe", {"attention_bias": True}, "attention_bias"),
    Case("qwen3_moe", {"rope_scaling": YARN}, "rope_scaling"),
    Case("qwen3_moe", {"rope_scaling": LINEAR}, "rope_scaling"),
    Case("qwen3_moe", {"rope_scaling": LONG}, "rope_scaling"),
    Case(
        "qwen3_moe",
        {"rope_scaling": DYNAMIC, "max_position_embeddings": models.SEQUENCE // 2},
        "rope_scaling",
    ),
    Case("qwen3_moe", {"rope_scaling": DYNAMIC, "max_position_embeddings": models.SEQUENCE}),
    Case("qwen3_moe", {"rope_scaling": {"rope_type": "default"}}),
    Case(
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": models.SEQUENCE - 1, "max_window_layers": 0},
        "use_sliding_window",
    ),
    Case(
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": models.SEQUENCE, "max_window_layers": 0},
    ),
    Case("qwen3_moe", {"use_sliding_window": False, "sliding_window": 4}),
    Case(
        "qwen3_moe",
        {"mlp_only_layers": [0], "intermediate_size": 96},
        "mlp_only_layers, decoder_sparse_step",
    ),
    Case(
        "qwen3_moe",
        {"decoder_sparse_step": 2, "intermediate_size": 96},
        "mlp_only_layers, decoder_sparse_step",
    ),
    Case("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    Case("mixtral", {}),
    Case("mixtral", {"sliding_window": models.SEQUENCE - 1}, "sliding_window"),
    Case("mixtral", {"sliding_window": models.SEQUENCE}),
    Case("mixtral", {"rope_scaling": YARN}, "rope_scaling"),
    Case("mixtral", {"head_dim": 32}, "head_dim"),
    Case("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    Case("llama4", {}),
    Case("llama4", {"num_experts_per_tok": 2}, "num_experts_per_tok"),
    Case("llama4", {"moe_layers": [0, 3]}, "moe_layers"),
    Case("llama4", {"moe_layers": [1, 3]}),
    Case("llama4", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    Case("llama4", {"rope_scaling": SCOUT, **LONG_WAVES}, "rope_scaling"),
    Case(
        "llama4",
        {"attn_temperature_tuning": True, "floor_scale": models.SEQUENCE // 2, "attn_scale": 0.1},
        "attn_temperature_tuning",
    ),
    Case(
        "llama4",
        {"attn_temperature_tuning": True, "floor_scale": models.SEQUENCE + 1, "attn_scale": 0.1},
    ),
    Case("llama4", {"attention_chunk_size": models.SEQUENCE // 2}),
    Case("llama4", {"no_rope_layers": [1, 1, 0, 1]}),
]

SAVE: dict[str, Callable[..., Path]] = {
    "qwen3_moe": models.save_qwen3_moe,
    "mixtral": models.save_mixtral,
    "llama4": models.save_llama4,
}
FAMILIES = {family.name: family for family in OF_NXDI}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest, target: Target) -> Case:
    found: Case = request.param
    if target.is_double and found.family == "llama4":
        pytest.skip("the double's Llama 4 has no attention of its own")
    return found


@pytest.fixture
def checkpoint(case: Case, tmp_path: Path) -> Path:
    return SAVE[case.family](tmp_path / "model", **case.fields)


def logits_error(nxdi: Any, checkpoint: Path) -> float:
    """Error of the whole model's logits against Hugging Face."""
    expected = models.load(checkpoint)(models.prompt()).logits[:, -1]
    return float(nxdi.relative_error(nxdi.load(checkpoint).logits(models.prompt()), expected))


def test_nxdi_does_what_is_said_of_it(nxdi: Any, case: Case, checkpoint: Path) -> None:
    if case.field is None:
        assert logits_error(nxdi, checkpoint) < ROUNDING
        return
    (limit,) = (one for one in FAMILIES[case.family].limits if one.field == case.field)
    try:
        error = logits_error(nxdi, checkpoint)
    except Exception as failure:
        assert limit.effect is Effect.FAILS, failure
        assert not isinstance(failure, ExpertScaleError)
        return
    if limit.effect is Effect.INEXACT:
        assert ROUNDING < error < FP8
    else:
        assert error > FP8


@pytest.mark.usefixtures("active")
def test_flag_is_refused_where_nxdi_is_wrong(
    nxdi: Any, case: Case, checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {**nxdi.FP8, "quantized_checkpoints_path": str(tmp_path), "expert_wise_scale": True}
    reached = [
        one
        for one in FAMILIES[case.family].limits
        if case.field is not None and one.field == case.field
    ]
    with caplog.at_level(logging.WARNING):
        if not reached or reached[0].effect is Effect.INEXACT:
            nxdi.inference_config(checkpoint, **asked)
        else:
            with pytest.raises(ConfigurationError) as refused:
                nxdi.inference_config(checkpoint, **asked)
            assert reached[0].problem in str(refused.value)
            assert "a limit of NxDI itself" in str(refused.value)

    warned = bool(reached) and reached[0].effect is Effect.INEXACT
    assert ("a limit of NxDI itself" in caplog.text) is warned
    # Without the flag, and unquantized, it is none of our business.
    nxdi.inference_config(checkpoint, **{**asked, "expert_wise_scale": False})
    nxdi.inference_config(checkpoint)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_tied_embeddings_are_made_right(
    nxdi: Any, tmp_path: Path, active: None, family: str
) -> None:
    """Without this package NxDI raises NotImplementedError."""
    checkpoint = SAVE[family](tmp_path / "model", tie_word_embeddings=True)
    expected = models.load(checkpoint)(models.prompt()).logits[:, -1]

    assert logits_error(nxdi, checkpoint) < ROUNDING

    quantize_checkpoint(checkpoint, tmp_path / "fp8")
    asked = neuron_settings(tmp_path / "fp8").neuron_config
    assert "lm_head" in asked["modules_to_not_convert"]
    loaded = nxdi.load(checkpoint, **asked)
    assert nxdi.relative_error(loaded.logits(models.prompt()), expected) < 2 * FP8


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_tied_embeddings_fail_without_this_package(nxdi: Any, tmp_path: Path, family: str) -> None:
    checkpoint = SAVE[family](tmp_path / "model", tie_word_embeddings=True)

    with pytest.raises(NotImplementedError):
        nxdi.load(checkpoint)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama4"])
def test_config_of_transformers_5_is_read_as_another_one(
    nxdi: Any, target: Target, tmp_path: Path, active: None, family: str
) -> None:
    if target.is_double and family == "llama4":
        pytest.skip("the double's Llama 4 has no attention of its own")
    checkpoint = SAVE[family](tmp_path / "model", rope_theta=100.0)
    expected = models.load(checkpoint)(models.prompt()).logits[:, -1]
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    text.pop("rope_scaling", None)
    file.write_text(json.dumps(config))
    asked = {**nxdi.FP8, "quantized_checkpoints_path": str(tmp_path), "expert_wise_scale": True}

    logits = nxdi.load(checkpoint).logits(models.prompt())

    assert nxdi.relative_error(logits, expected) > FP8
    with pytest.raises(ConfigurationError, match="written by transformers 5"):
        nxdi.inference_config(checkpoint, **asked)


def test_every_limit_is_seen() -> None:
    seen = {(case.family, case.field) for case in CASES}
    seen |= {(family, "rope_parameters") for family in SAVE}

    for family in OF_NXDI:
        for limit in family.limits:
            assert (family.name, limit.field) in seen
