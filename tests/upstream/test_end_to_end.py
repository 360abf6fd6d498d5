"""A Qwen3 MoE through NxDI with the patches in force: quantized, converted, loaded, run.

The error is that of a layer's MoE output against Hugging Face, given the same input.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.testing.whole_model import WITHIN_FP8
from tests.harness import models
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

ROUNDING = 1e-5
NONSENSE = 0.5
EXPERTS = "mlp.expert_mlps.mlp_op"
FUSED = ("gate_up_proj", "down_proj")

Record = Callable[[str, object], None]


@pytest.fixture(scope="session")
def fp8(nxdi: Any, moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings with which the model is loaded from what NxDI's own step has quantized."""
    return nxdi.quantize(moe, tmp_path_factory.mktemp("fp8"))


def test_expert_wise_scales_keep_the_model(
    nxdi: Any, moe: Path, fp8: dict[str, Any], record_property: Record
) -> None:
    loaded = nxdi.load(moe, **fp8, expert_wise_scale=True)

    found = nxdi.assert_right(moe, loaded)
    record_property("MoE error, expert-wise", max(found.moe))
    record_property("error of attention, expert-wise", max(found.attention))
    record_property("error of a parameter, expert-wise", max(found.parameters.values()))
    record_property("error of the logits, expert-wise", found.logits)
    for layer in loaded.module.layers:
        experts = layer.mlp.expert_mlps.mlp_op
        gate_up = (models.EXPERTS, 1, 2 * models.MOE_INTERMEDIATE_SIZE)
        assert experts.gate_up_proj.scale.shape == gate_up
        assert experts.down_proj.scale.shape == (models.EXPERTS, 1, models.HIDDEN_SIZE)
        assert experts.gate_up_proj.scale.dtype == experts.down_proj.scale.dtype == torch.float32
        attention = layer.self_attn.qkv_proj.q_proj
        assert attention.quantization_type.value == "per_channel_symmetric"


def test_averaged_scales_lose_the_model(
    nxdi: Any, moe: Path, fp8: dict[str, Any], record_property: Record
) -> None:
    loaded = nxdi.load(moe, **fp8)

    found = nxdi.compare(moe, loaded)
    record_property("MoE error, averaged", min(found.moe))
    record_property("error of the logits, averaged", found.logits)
    assert min(found.moe) > NONSENSE
    assert set(found.beyond(WITHIN_FP8)) == {
        "logits",
        *(f"MoE block {number}" for number in range(2)),
        *(f"layers.{number}.{EXPERTS}.{name}.weight" for number in range(2) for name in FUSED),
    }
    experts = loaded.module.layers[0].mlp.expert_mlps.mlp_op
    assert experts.gate_up_proj.scale.shape == (1, 1, 2 * models.MOE_INTERMEDIATE_SIZE)


def test_averaging_says_how_far_the_scales_lie_apart(
    nxdi: Any, moe: Path, fp8: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    nxdi.load(moe, **fp8)

    warnings = [
        line for line in caplog.messages if "expert_wise_scale=True" in line.replace("Set ", "")
    ]
    assert len(warnings) == 1


def test_bfloat16_model_keeps_scales_in_float32(nxdi: Any, moe: Path, fp8: dict[str, Any]) -> None:
    loaded = nxdi.load(moe, **fp8, expert_wise_scale=True, torch_dtype=torch.bfloat16)

    scale = loaded.module.layers[0].mlp.expert_mlps.mlp_op.gate_up_proj.scale
    assert scale.dtype == torch.float32
    assert loaded.module.layers[0].input_layernorm.weight.dtype == torch.bfloat16


def test_our_quantizer_equals_nxdis_own_step(
    nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path
) -> None:
    from nxdi_expertscale import quantize_checkpoint

    quantize_checkpoint(moe, tmp_path / "ours")
    ours = {**fp8, "quantized_checkpoints_path": str(tmp_path / "ours")}

    expected = nxdi.convert(moe, **fp8, expert_wise_scale=True)
    actual = nxdi.convert(moe, **ours, expert_wise_scale=True)

    assert nxdi.different_tensors(actual, expected) == []


def test_fused_qkv_changes_nothing(
    nxdi: Any, target: Target, moe: Path, fp8: dict[str, Any]
) -> None:
    if target.version < (0, 6):
        pytest.skip("this release cannot fuse the QKV weights of a Qwen3 MoE")
    apart = nxdi.load(moe, **fp8, expert_wise_scale=True)
    fused = nxdi.load(moe, **fp8, expert_wise_scale=True, fused_qkv=True)

    nxdi.assert_right(moe, fused, fused_qkv=True)
    assert (
        nxdi.relative_error(fused.logits(models.prompt()), apart.logits(models.prompt())) < ROUNDING
    )


def test_padded_experts_give_the_same_output(
    nxdi: Any, target: Target, moe: Path, fp8: dict[str, Any]
) -> None:
    if target.version < (0, 7):
        pytest.skip("this release does not pad the experts")
    settings = {"blockwise_matmul_config": {"use_shard_on_intermediate_dynamic_while": True}}
    padded = nxdi.load(moe, **fp8, **settings, expert_wise_scale=True)

    scale = padded.module.layers[0].mlp.expert_mlps.mlp_op.gate_up_proj.scale
    assert scale.shape == (models.EXPERTS, 1, 2 * 256)
    assert not scale[:, :, models.MOE_INTERMEDIATE_SIZE : 256].any()
    nxdi.assert_right(moe, padded, **settings)


@pytest.mark.parametrize("name", ["layers.0.mlp.experts", "layers.0.mlp.expert_mlps"])
def test_one_layers_experts_stay_in_full_precision(
    nxdi: Any, moe: Path, tmp_path: Path, fp8: dict[str, Any], name: str
) -> None:
    from nxdi_expertscale import quantize_checkpoint

    quantize_checkpoint(moe, tmp_path / "fp8", modules_to_not_convert=[name])
    settings = {
        **fp8,
        "quantized_checkpoints_path": str(tmp_path / "fp8"),
        "modules_to_not_convert": [nxdi.ROUTER, name],
    }

    loaded = nxdi.load(moe, **settings, expert_wise_scale=True)
    first, second = nxdi.assert_right(moe, loaded).moe

    assert first < ROUNDING
    assert ROUNDING < second < WITHIN_FP8


@pytest.mark.parametrize("flag", [True, False])
def test_nxdis_own_exclusion_of_one_layers_experts_holds(
    nxdi: Any, moe: Path, tmp_path: Path, flag: bool
) -> None:
    excluded = [nxdi.ROUTER, "layers.0.mlp.experts"]
    settings = nxdi.quantize(moe, tmp_path / "fp8", not_converted=excluded)

    first, second = nxdi.moe_errors(moe, nxdi.load(moe, **settings, expert_wise_scale=flag))

    assert first < ROUNDING
    assert second > ROUNDING


def test_exclusion_of_a_part_of_the_fused_experts_is_refused(
    nxdi: Any, moe: Path, fp8: dict[str, Any]
) -> None:
    """NxD leaves every module alone whose path contains it, quantized in the checkpoint or not."""
    excluded = [nxdi.ROUTER, "gate_up"]

    with pytest.raises(ConfigurationError, match="'gate_up' names a part of what NxDI fuses"):
        nxdi.load(moe, **{**fp8, "modules_to_not_convert": excluded}, expert_wise_scale=False)


def test_all_experts_stay_in_full_precision(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    settings = nxdi.quantize(moe, tmp_path / "fp8", not_converted=[nxdi.ROUTER, "mlp.experts"])

    loaded = nxdi.load(moe, **settings, expert_wise_scale=True)

    assert max(nxdi.assert_right(moe, loaded).moe) < ROUNDING
    attention = loaded.module.layers[0].self_attn.qkv_proj.q_proj
    assert attention.weight.dtype == torch.float8_e4m3fn


def test_quantized_router_is_dequantized(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    settings = nxdi.quantize(moe, tmp_path / "fp8", not_converted=["lm_head"])

    loaded = nxdi.load(moe, **settings, expert_wise_scale=True)

    original = models.load(moe)
    for layer, reference in zip(loaded.module.layers, original.model.layers, strict=True):
        router = layer.mlp.router.linear_router.weight
        assert router.dtype == torch.float32
        assert nxdi.relative_error(router, reference.mlp.gate.weight) < WITHIN_FP8


def test_few_tokens_load_their_experts_selectively(nxdi: Any, tmp_path: Path) -> None:
    many = models.save_qwen3_moe(tmp_path / "many", experts=64)
    settings = nxdi.quantize(many, tmp_path / "fp8")

    loaded = nxdi.load(many, **settings, expert_wise_scale=True)

    nxdi.assert_right(many, loaded)
