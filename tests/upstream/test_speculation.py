"""A draft and its target in one graph. Both have the flag: a draft's config is a copy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import models
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

SPECULATION = {
    "enable_fused_speculation": True,
    "speculation_length": 2,
    "on_device_sampling_config": {"top_k": 1},
    "expert_wise_scale": True,
}


@pytest.fixture
def application(nxdi: Any, moe: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """NxDI's Qwen3 MoE; what fused speculation writes on the class is taken off again."""
    application = nxdi.application_cls(moe)
    monkeypatch.setattr(application, "_FUSED_PREFIX", "")
    monkeypatch.setattr(application, "_model_cls", application._model_cls)
    return application


def draft_settings(config: Any) -> Any:
    """A draft's neuron config, made of the target's as inference_demo and vLLM-Neuron do."""
    settings = copy.deepcopy(config.neuron_config)
    settings.speculation_length = 0
    settings.enable_fused_speculation = False
    return settings


def quantized_types(model: Any) -> set[str]:
    return {
        module.quantization_type.value
        for module in model.modules()
        if hasattr(module, "quantization_type")
    }


def test_dense_draft_beside_the_target(
    nxdi: Any,
    application: Any,
    target: Target,
    moe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if target.version < (0, 7):
        pytest.skip("in this release a draft is of the target's class")
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig

    draft = models.save_qwen3(tmp_path / "draft")
    dense = nxdi.application_cls(draft)
    monkeypatch.setattr(dense, "_FUSED_PREFIX", "")
    draft_fp8 = nxdi.quantize(draft, tmp_path / "draft_fp8", not_converted=["lm_head"])
    alone, unquantized = nxdi.load(draft, **draft_fp8), nxdi.load(moe)
    config = nxdi.inference_config(moe, **nxdi.quantize(moe, tmp_path / "fp8"), **SPECULATION)
    draft_config = dense.get_config_cls()(
        draft_settings(config), load_config=nxdi.load_pretrained_config(str(draft))
    )
    draft_config.neuron_config.modules_to_not_convert = ["lm_head"]
    config.fused_spec_config = FusedSpecNeuronConfig(
        application._model_cls,
        draft_config=draft_config,
        draft_model_path=draft_fp8["quantized_checkpoints_path"],
        draft_model_cls=dense,
    )

    loaded = nxdi.load_application(application(str(moe), config))

    drafting, verifying = loaded.module.draft_model, loaded.module.target_model
    assert quantized_types(drafting) == {"per_channel_symmetric"}
    assert nxdi.different_tensors(drafting.state_dict(), alone.module.state_dict()) == []
    logits = nxdi.part(drafting).logits(models.prompt())
    assert torch.equal(logits, alone.logits(models.prompt()))
    nxdi.assert_right(moe, nxdi.part(verifying), reference=unquantized)


def test_moe_draft_beside_the_target(
    nxdi: Any, application: Any, moe: Path, tmp_path: Path
) -> None:
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig

    unquantized = nxdi.load(moe)
    settings = nxdi.quantize(moe, tmp_path / "fp8")
    config = nxdi.inference_config(moe, **settings, **SPECULATION)
    draft_config = nxdi.application_cls(moe).get_config_cls()(
        draft_settings(config), load_config=nxdi.load_pretrained_config(str(moe))
    )
    config.fused_spec_config = FusedSpecNeuronConfig(
        application._model_cls,
        draft_config=draft_config,
        draft_model_path=str(tmp_path / "fp8"),
    )

    loaded = nxdi.load_application(application(str(moe), config))

    for model in (loaded.module.draft_model, loaded.module.target_model):
        assert quantized_types(model) == {
            "per_channel_symmetric",
            "expert_wise_per_channel_symmetric",
        }
        nxdi.assert_right(moe, nxdi.part(model), reference=unquantized)
        assert model.layers[0].mlp.expert_mlps.mlp_op.down_proj.scale.dtype == torch.float32
