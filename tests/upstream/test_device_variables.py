"""The FP8 variables of the device, as soon as a config asks for experts in FP8."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale.settings.device_variables import VARIABLES

pytestmark = pytest.mark.usefixtures("active")

FP8 = {
    "quantized": True,
    "quantized_checkpoints_path": "fp8",
    "quantization_type": "per_channel_symmetric",
    "quantization_dtype": "f8e4m3",
}


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        # Set first, so that what the test sets is taken away again.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_flag_and_fp8_set_them(nxdi: Any, moe: Path) -> None:
    nxdi.inference_config(moe, **FP8, expert_wise_scale=True)

    assert [os.environ.get(name) for name in VARIABLES] == ["1", "1"]


@pytest.mark.parametrize(
    "settings",
    [
        FP8,
        {**FP8, "expert_wise_scale": True, "quantization_dtype": "int8"},
        {**FP8, "expert_wise_scale": True, "quantized": False},
    ],
    ids=["flag off", "int8", "not quantized"],
)
def test_anything_else_leaves_them(nxdi: Any, moe: Path, settings: dict[str, Any]) -> None:
    nxdi.inference_config(moe, **settings)

    assert not {*VARIABLES} & {*os.environ}
