"""The flag in the JSON of a config, and of a compiled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale import ConfigurationError
from nxdi_expertscale.settings.compiled_config import check_compiled_config, is_on_in

ON = {"neuron_config": {"expert_wise_scale": True, "quantized": True}}
OFF = {"neuron_config": {"expert_wise_scale": False, "quantized": True}}
BEFORE = {"neuron_config": {"quantized": True}}
"""Compiled without this package."""


@pytest.mark.parametrize(
    ("config", "expected"),
    [(ON, True), (OFF, False), (BEFORE, False), ({}, False), ({"neuron_config": None}, False)],
)
def test_flag_is_found_in_json(config: dict[str, Any], expected: bool) -> None:
    assert is_on_in(json.dumps(config)) is expected


def check(
    folder: Path, compiled: dict[str, Any], asked: dict[str, Any], *, wins: bool = True
) -> None:
    (folder / "neuron_config.json").write_text(json.dumps(compiled))
    check_compiled_config(folder, asked, compiled_wins=wins)


@pytest.mark.parametrize("compiled", [OFF, BEFORE])
@pytest.mark.parametrize("wins", [True, False])
def test_compiled_without_the_flag_is_refused(
    tmp_path: Path, compiled: dict[str, Any], wins: bool
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{tmp_path}/neuron_config.json: the model was"):
        check(tmp_path, compiled, ON, wins=wins)


def test_compiled_with_the_flag_runs_rightly_where_its_config_wins(tmp_path: Path) -> None:
    check(tmp_path, ON, OFF, wins=True)
    with pytest.raises(ConfigurationError, match="compiled with expert_wise_scale=True"):
        check(tmp_path, ON, OFF, wins=False)


def test_language_model_and_draft_have_configs_of_their_own(tmp_path: Path) -> None:
    check(tmp_path, {"text_config": ON}, {"text_config": ON})
    with pytest.raises(ConfigurationError, match="the model was"):
        check(tmp_path, {**ON, "text_config": OFF}, {**ON, "text_config": ON})
    speculation = {"draft_config": ON}
    check(tmp_path, ON, {**ON, "fused_spec_config": speculation})
    with pytest.raises(ConfigurationError, match="the draft was"):
        check(
            tmp_path,
            {**ON, "fused_spec_config": {"draft_config": BEFORE}},
            {**ON, "fused_spec_config": speculation},
        )


def test_nothing_is_said_without_quantization_or_without_a_config(tmp_path: Path) -> None:
    check(tmp_path, OFF, {"neuron_config": {"expert_wise_scale": True, "quantized": False}})
    check_compiled_config(tmp_path / "none", ON, compiled_wins=True)
