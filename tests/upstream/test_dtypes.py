"""The dtypes of quantized weights that NxD knows, from NxDI's own step to a layer's output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.errors import ConfigurationError
from tests.harness import models
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

DTYPES = {
    "f8e4m3": (torch.float8_e4m3fn, 0.06),
    "f8e5m2": (torch.float8_e5m2, 0.12),
    "int8": (torch.int8, 0.02),
}
"""The dtype of the weights, and the error of a layer's output that its rounding explains."""


def only_int8_and_f8e4m3(target: Target) -> bool:
    """Whether ``load_module`` makes int8 layers for every name but ``f8e4m3``."""
    return target.version < (0, 7)


@pytest.mark.parametrize("name", DTYPES)
def test_experts_keep_their_scales_in_every_dtype(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path, name: str
) -> None:
    if target.is_double and name != "f8e4m3":
        pytest.skip("the double quantizes to one dtype")
    dtype, error = DTYPES[name]
    settings = nxdi.quantize(moe, tmp_path / name, quantization_dtype=name)

    if name == "f8e5m2" and only_int8_and_f8e4m3(target):
        with pytest.raises(ConfigurationError, match=r"quantization_dtype='f8e5m2'.*torch\.int8"):
            nxdi.load(moe, **settings, expert_wise_scale=True)
        return
    loaded = nxdi.load(moe, **settings, expert_wise_scale=True)

    experts = loaded.module.layers[0].mlp.expert_mlps.mlp_op
    assert experts.gate_up_proj.weight.dtype == experts.down_proj.weight.dtype == dtype
    assert experts.down_proj.scale.shape == (models.EXPERTS, 1, models.HIDDEN_SIZE)
    nxdi.assert_right(moe, loaded, within=error)


def test_dtype_that_the_release_does_not_make_is_refused_without_the_flag_too(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path
) -> None:
    if target.is_double or not only_int8_and_f8e4m3(target):
        pytest.skip("this release makes layers of every dtype")
    settings = nxdi.quantize(moe, tmp_path / "fp8", quantization_dtype="f8e5m2")

    with pytest.raises(ConfigurationError, match="quantization_dtype='f8e5m2'"):
        nxdi.load(moe, **settings)


@pytest.mark.parametrize(("made", "asked"), [("f8e4m3", "int8"), ("int8", "f8e4m3")])
def test_checkpoint_of_another_dtype_is_refused(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path, made: str, asked: str
) -> None:
    if target.is_double and made != "f8e4m3":
        pytest.skip("the double quantizes to one dtype")
    settings = nxdi.quantize(moe, tmp_path / made, quantization_dtype=made)

    with pytest.raises(ConfigurationError, match=f"quantization_dtype={asked!r}"):
        nxdi.convert(moe, **{**settings, "quantization_dtype": asked}, expert_wise_scale=True)


def test_dtype_that_nxdi_casts_is_refused(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    settings = {
        **nxdi.FP8,
        "quantization_dtype": "f8e5m2",
        "quantized_checkpoints_path": str(tmp_path),
        "torch_dtype": torch.bfloat16,
    }

    with pytest.raises(ConfigurationError, match=r"casts such weights to torch\.bfloat16"):
        nxdi.inference_config(moe, **settings, expert_wise_scale=True)
    assert nxdi.inference_config(moe, **settings, cast_type="as-declared")
