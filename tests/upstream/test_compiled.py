"""A compiled model is loaded with the flag that it was compiled with, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale import ConfigurationError, quantize_checkpoint

pytestmark = pytest.mark.usefixtures("active")


@pytest.fixture
def fp8(nxdi: Any, moe: Path, tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "fp8"
    quantize_checkpoint(moe, folder)
    return {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(folder),
        "modules_to_not_convert": [nxdi.ROUTER],
    }


def application(nxdi: Any, moe: Path, settings: dict[str, Any]) -> Any:
    return nxdi.application_cls(moe)(str(moe), nxdi.inference_config(moe, **settings))


def compiled(nxdi: Any, moe: Path, settings: dict[str, Any], folder: Path) -> str:
    """A folder as ``compile`` leaves it, without the compiled model itself."""
    nxdi.inference_config(moe, **settings).save(str(folder))
    return str(folder)


@pytest.mark.parametrize(
    ("then", "now", "says"),
    [
        (False, True, "the model was compiled without expert_wise_scale, and"),
        (True, False, "the model was compiled with expert_wise_scale=True, and it is not asked"),
    ],
)
def test_compiled_model_of_another_setting_is_refused_naming_its_folder(
    nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path, then: bool, now: bool, says: str
) -> None:
    folder = compiled(nxdi, moe, {**fp8, "expert_wise_scale": then}, tmp_path / "compiled")
    model = application(nxdi, moe, {**fp8, "expert_wise_scale": now})

    with pytest.raises(ConfigurationError) as refused:
        model.load(folder)

    assert str(refused.value).startswith(f"{folder}/neuron_config.json: {says}")


def test_draft_counts_as_well(nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path) -> None:
    def fused(draft_flag: bool) -> Any:
        from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig

        asked = {**fp8, "expert_wise_scale": True}
        config = nxdi.inference_config(moe, **asked, enable_fused_speculation=True)
        draft = nxdi.inference_config(moe, **{**fp8, "expert_wise_scale": draft_flag})
        config.fused_spec_config = FusedSpecNeuronConfig(
            nxdi.application_cls(moe)._model_cls, draft_config=draft, draft_model_path=str(moe)
        )
        return config

    fused(draft_flag=False).save(str(tmp_path / "compiled"))
    model = application(nxdi, moe, {**fp8, "expert_wise_scale": True})
    model.config = fused(draft_flag=True)

    with pytest.raises(ConfigurationError, match="the draft was compiled without"):
        model.load(str(tmp_path / "compiled"))


@pytest.mark.parametrize("flag", [True, False])
def test_compiled_model_of_the_same_setting_is_loaded(
    nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path, flag: bool
) -> None:
    asked = {**fp8, "expert_wise_scale": flag}
    folder = compiled(nxdi, moe, asked, tmp_path / "compiled")

    # As far as to the compiled model, which is not there.
    with pytest.raises((ValueError, RuntimeError), match=r"model\.pt"):
        application(nxdi, moe, asked).load(folder)


def test_flag_does_not_count_without_quantization(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    folder = compiled(nxdi, moe, {}, tmp_path / "compiled")

    with pytest.raises((ValueError, RuntimeError), match=r"model\.pt"):
        application(nxdi, moe, {"expert_wise_scale": True}).load(folder)


def test_folder_without_a_config_is_nxdis_matter(
    nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError)) as failed:
        application(nxdi, moe, {**fp8, "expert_wise_scale": True}).load(str(tmp_path / "none"))

    assert not isinstance(failed.value, ConfigurationError)
