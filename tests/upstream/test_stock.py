"""NxDI without this package: that the harness runs it rightly, and what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import models

ROUNDING = 1e-5
FP8_MAX = 240.0
EXPERT_WISE = "expert_wise_per_channel_symmetric"


def test_unquantized_model_agrees_with_hugging_face(nxdi: Any, moe: Path) -> None:
    loaded = nxdi.load(moe)

    nxdi.assert_right(moe, loaded, within=ROUNDING)


def test_quantized_experts_cannot_be_loaded(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    settings = nxdi.quantize(moe, tmp_path / "fp8")

    with pytest.raises(RuntimeError, match=r"Cannot find .*mlp_op\.gate_up_proj\.scale"):
        nxdi.load(moe, **settings)


def test_experts_in_full_precision_are_exact(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    under_both_names = [nxdi.ROUTER, "mlp.experts", "mlp.expert_mlps"]
    settings = nxdi.quantize(moe, tmp_path / "fp8", not_converted=under_both_names)

    loaded = nxdi.load(moe, **settings)

    assert max(nxdi.assert_right(moe, loaded).moe) < ROUNDING
    attention = loaded.module.layers[0].self_attn.qkv_proj.q_proj
    assert attention.weight.dtype == torch.float8_e4m3fn


def test_quantized_router_is_loaded_without_its_scale(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    only_experts_kept = ["mlp.experts", "mlp.expert_mlps"]
    settings = nxdi.quantize(moe, tmp_path / "fp8", not_converted=only_experts_kept)

    loaded = nxdi.load(moe, **settings)

    router = loaded.module.layers[0].mlp.router.linear_router.weight
    assert router.abs().amax() == FP8_MAX
    assert max(nxdi.moe_errors(moe, loaded)) > 0.1


def test_quantization_is_int8_with_one_scale_for_a_tensor_unless_said_otherwise(
    nxdi: Any, moe: Path
) -> None:
    settings = nxdi.inference_config(moe).neuron_config

    assert settings.quantization_type == "per_tensor_symmetric"
    assert settings.quantization_dtype == "int8"


def quantized_by(nxdi: Any, moe: Path, **selection: list[str]) -> set[str]:
    """Paths of a model's modules that NxD's ``convert`` quantizes."""
    from neuronx_distributed.quantization import quantization_config
    from neuronx_distributed.quantization.quantize import convert

    config = nxdi.inference_config(moe)
    model = nxdi.application_cls(moe)._model_cls(config)
    q_config = quantization_config.get_default_per_channel_custom_qconfig_dict()
    convert(model, q_config=q_config, inplace=True, mapping=None, **selection)
    return {name for name, part in model.named_modules() if hasattr(part, "quantization_type")}


def test_convert_selects_by_pattern_or_excludes_by_part_of_the_path(nxdi: Any, moe: Path) -> None:
    experts = {
        f"layers.{layer}.mlp.expert_mlps.mlp_op.{name}"
        for layer in range(models.LAYERS)
        for name in ("gate_up_proj", "down_proj")
    }

    everything = quantized_by(nxdi, moe)

    assert experts < everything
    assert not {name for name in everything if "router" in name or "embed" in name}
    assert quantized_by(nxdi, moe, include=["*expert_mlps.mlp_op*"]) == experts
    assert quantized_by(nxdi, moe, include=sorted(experts)) == experts
    assert quantized_by(nxdi, moe, modules_to_not_convert=["expert_mlps"]) == everything - experts
    with pytest.raises(AssertionError, match="Either include and modules_to_not_convert"):
        quantized_by(nxdi, moe, include=["*"], modules_to_not_convert=["lm_head"])


def test_expert_wise_type_is_not_for_other_layers(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    settings = nxdi.quantize(moe, tmp_path / "fp8")
    settings["quantization_type"] = EXPERT_WISE

    with pytest.raises(AssertionError, match="per_channel_axis cannot be None"):
        nxdi.load(moe, **settings)


@pytest.mark.parametrize("shape", [(1, 1), (models.EXPERTS, 2)])
def test_scale_of_another_shape_is_refused(
    nxdi: Any, moe: Path, tmp_path: Path, shape: tuple[int, int]
) -> None:
    from neuronx_distributed.trace.trace import get_sharded_checkpoint
    from neuronx_distributed_inference.models.model_wrapper import DecoderModelInstance

    but_experts = ["self_attn", "lm_head", nxdi.ROUTER]
    settings = nxdi.quantize(moe, tmp_path / "fp8", not_converted=but_experts)
    settings["quantization_type"] = EXPERT_WISE
    config = nxdi.inference_config(moe, **settings)
    instance = DecoderModelInstance(nxdi.application_cls(moe)._model_cls, config)
    instance.load_module()
    state_dict = nxdi.convert(moe, **settings)
    experts = "layers.0.mlp.expert_mlps.mlp_op"
    state_dict[f"{experts}.gate_up_proj.scale"] = torch.ones(
        *shape, 2 * models.MOE_INTERMEDIATE_SIZE
    )

    with pytest.raises(RuntimeError, match=r"expected shape .*gate_up_proj\.scale"):
        get_sharded_checkpoint(state_dict, instance.module, 0, 1)


def test_unknown_keyword_is_only_warned_of(
    nxdi: Any, moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nxdi.inference_config(moe, no_such_setting=1)

    assert "no_such_setting" in caplog.text
