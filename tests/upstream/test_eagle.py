"""EAGLE: a dense draft that reads the hidden states of an MoE target, in one graph with it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nxdi_expertscale.testing.whole_model import WITHIN_FP8
from tests.harness import models
from tests.harness.targets import Target
from tests.upstream.test_speculation import quantized_types

pytestmark = pytest.mark.usefixtures("active")

EAGLE = {
    "enable_fused_speculation": True,
    "enable_eagle_speculation": True,
    "speculation_length": 2,
    "on_device_sampling_config": {"top_k": 1},
    "draft_model_modules_to_not_convert": ["layers", "fc", "lm_head"],
}


def save_eagle_draft(folder: Path) -> Path:
    """Write a Llama of one layer, with what an EAGLE draft has beside one."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=models.HIDDEN_SIZE,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )
    fused_inputs = torch.randn(models.HIDDEN_SIZE, 2 * models.HIDDEN_SIZE)
    state_dict = {**model.state_dict(), "model.fc.weight": fused_inputs}
    model.save_pretrained(folder, state_dict=state_dict)
    return folder


@pytest.mark.parametrize("expert_wise", [True, False])
def test_eagle_draft_stays_as_it_is_beside_the_target(
    nxdi: Any,
    target: Target,
    moe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expert_wise: bool,
) -> None:
    if target.is_double or target.version < (0, 7):
        pytest.skip("in this release a draft is of the target's class, which is no EAGLE draft")
    from neuronx_distributed_inference.models.config import FusedSpecNeuronConfig
    from neuronx_distributed_inference.models.llama import modeling_llama as llama

    application = nxdi.application_cls(moe)
    for owner in (application, llama.NeuronLlamaForCausalLM):
        monkeypatch.setattr(owner, "_FUSED_PREFIX", "")
    monkeypatch.setattr(application, "_model_cls", application._model_cls)
    draft = save_eagle_draft(tmp_path / "draft")
    unquantized = nxdi.load(moe)
    settings = nxdi.quantize(moe, tmp_path / "fp8")
    config = nxdi.inference_config(moe, **settings, **EAGLE, expert_wise_scale=expert_wise)
    # What inference_demo and vLLM-Neuron make of the target's config for the draft.
    draft_settings = copy.deepcopy(config.neuron_config)
    draft_settings.modules_to_not_convert = draft_settings.draft_model_modules_to_not_convert
    draft_settings.enable_fused_speculation = False
    draft_settings.is_eagle_draft = True
    config.fused_spec_config = FusedSpecNeuronConfig(
        application._model_cls,
        draft_config=llama.LlamaInferenceConfig(
            draft_settings, load_config=nxdi.load_pretrained_config(str(draft))
        ),
        draft_model_path=str(draft),
        draft_model_cls=llama.NeuronLlamaForCausalLM,
    )

    loaded = nxdi.load_application(application(str(moe), config)).module

    assert quantized_types(loaded.draft_model) == set()
    weights = models.load(draft).model.layers[0].mlp
    assert torch.equal(loaded.draft_model.layers[0].mlp.down_proj.weight, weights.down_proj.weight)
    kept_apart = "expert_wise_per_channel_symmetric" in quantized_types(loaded.target_model)
    assert kept_apart is expert_wise
    found = nxdi.compare(moe, nxdi.part(loaded.target_model), reference=unquantized)
    if expert_wise:
        assert found.beyond(WITHIN_FP8) == {}
    else:
        assert max(found.moe) > WITHIN_FP8
