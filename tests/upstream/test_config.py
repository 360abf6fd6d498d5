"""The flag on NxDI's configs: taken, kept, copied, written, read, refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.errors import ConfigurationError

FLAG = "expert_wise_scale"

pytestmark = pytest.mark.usefixtures("active")


@pytest.fixture
def fp8(nxdi: Any, tmp_path: Path) -> dict[str, Any]:
    return {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(tmp_path),
        "modules_to_not_convert": [nxdi.ROUTER],
    }


@pytest.mark.parametrize("flag", [True, False])
def test_flag_is_kept_through_json_files_and_copies(
    nxdi: Any,
    moe: Path,
    tmp_path: Path,
    fp8: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    flag: bool,
) -> None:
    config = nxdi.inference_config(moe, **fp8, expert_wise_scale=flag)

    config.save(str(tmp_path / "saved"))
    again = [
        config,
        copy.deepcopy(config),
        nxdi.application_cls(moe).get_config_cls().from_json_string(config.to_json_string()),
        nxdi.application_cls(moe).get_config_cls().load(str(tmp_path / "saved")),
    ]

    assert [one.neuron_config.expert_wise_scale for one in again] == [flag] * len(again)
    assert json.loads(config.to_json_string())["neuron_config"][FLAG] is flag
    assert FLAG not in caplog.text


def test_flag_is_off_unless_it_is_set(nxdi: Any, moe: Path, fp8: dict[str, Any]) -> None:
    assert nxdi.inference_config(moe, **fp8).neuron_config.expert_wise_scale is False


def test_config_written_without_the_flag_is_read_as_off(
    nxdi: Any, moe: Path, fp8: dict[str, Any]
) -> None:
    written = json.loads(nxdi.inference_config(moe, **fp8).to_json_string())
    del written["neuron_config"][FLAG]

    config = nxdi.application_cls(moe).get_config_cls().from_json_string(json.dumps(written))

    assert config.neuron_config.expert_wise_scale is False


def test_subclasses_take_the_flag(
    nxdi: Any, fp8: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    class Settings(nxdi.MoENeuronConfig):
        def __init__(self, extra: int = 0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.extra = extra

    settings = Settings(extra=3, **fp8, expert_wise_scale=True, torch_dtype=torch.float32)

    assert (settings.extra, settings.expert_wise_scale) == (3, True)
    assert FLAG not in caplog.text


@pytest.mark.parametrize("value", ["true", 1, None])
def test_value_that_is_no_boolean_is_refused(
    nxdi: Any, moe: Path, fp8: dict[str, Any], value: object
) -> None:
    with pytest.raises(ConfigurationError, match="must be true or false"):
        nxdi.inference_config(moe, **fp8, expert_wise_scale=value)


def test_another_quantization_type_is_refused(nxdi: Any, moe: Path, fp8: dict[str, Any]) -> None:
    del fp8["quantization_type"]

    with pytest.raises(ConfigurationError, match="quantization_type='per_channel_symmetric'"):
        nxdi.inference_config(moe, **fp8, expert_wise_scale=True)


def test_flag_without_quantization_is_only_warned_of(
    nxdi: Any, moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nxdi.inference_config(moe, expert_wise_scale=True)

    assert "no effect" in caplog.text
