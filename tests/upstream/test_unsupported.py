"""Models of NxDI that cannot have one FP8 scale per expert: refused early, and rightly so."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from nxdi_expertscale import ConfigurationError
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

LAYERS, EXPERTS, HIDDEN, INNER = 1, 4, 8, 6


def neuron_config(nxdi: Any, **settings: Any) -> Any:
    return nxdi.MoENeuronConfig(batch_size=1, seq_len=16, **settings)


def upstream_model(target: Target, name: str, since: tuple[int, ...] = (0,)) -> ModuleType:
    if target.is_double:
        pytest.skip("the double has no such model")
    if target.version < since:
        pytest.skip(f"this release has no {name}")
    return importlib.import_module(f"neuronx_distributed_inference.models.{name}.modeling_{name}")


@pytest.mark.parametrize(
    ("model_type", "reason"), [("dbrx", "drops every scale"), ("gpt_oss", "MXFP4")]
)
def test_flag_is_refused_before_the_model_is_built(nxdi: Any, model_type: str, reason: str) -> None:
    from neuronx_distributed_inference.models.config import InferenceConfig

    settings = {**nxdi.FP8, "quantized_checkpoints_path": "fp8", "expert_wise_scale": True}

    with pytest.raises(ConfigurationError, match=rf"'{model_type}': .*{reason}"):
        InferenceConfig(neuron_config(nxdi, **settings), model_type=model_type)

    # Without the flag, or without quantization, it is none of our business.
    InferenceConfig(neuron_config(nxdi, **{**settings, "expert_wise_scale": False}))
    InferenceConfig(neuron_config(nxdi, expert_wise_scale=True), model_type=model_type)


def test_flag_is_refused_by_the_class_of_a_config_without_model_type(
    nxdi: Any, target: Target
) -> None:
    dbrx = upstream_model(target, "dbrx")
    settings = {**nxdi.FP8, "quantized_checkpoints_path": "fp8", "expert_wise_scale": True}
    required = [
        "d_model",
        "n_heads",
        "max_seq_len",
        "emb_pdrop",
        "resid_pdrop",
        "pad_token_id",
        "vocab_size",
        "attn_config",
        "ffn_config",
    ]

    with pytest.raises(ConfigurationError, match=r"'DbrxInferenceConfig': .*drops every scale"):
        dbrx.DbrxInferenceConfig(
            dbrx.NeuronDbrxConfig(batch_size=1, seq_len=16, **settings),
            **dict.fromkeys(required, 1),
        )


def test_dbrx_converter_drops_scales(target: Target) -> None:
    dbrx = upstream_model(target, "dbrx")
    block, attention = "blocks.0.ffn", "blocks.0.norm_attn_norm"
    names = {
        "wte.weight": (16, HIDDEN),
        "norm_f.weight": (HIDDEN,),
        "lm_head.weight": (16, HIDDEN),
        "lm_head.scale": (16, 1),
        f"{block}.router.layer.weight": (EXPERTS, HIDDEN),
        f"{attention}.attn.Wqkv.weight": (3 * HIDDEN, HIDDEN),
        f"{attention}.attn.Wqkv.scale": (3 * HIDDEN, 1),
        f"{attention}.attn.out_proj.weight": (HIDDEN, HIDDEN),
        f"{attention}.norm_1.weight": (HIDDEN,),
        f"{attention}.norm_2.weight": (HIDDEN,),
    }
    for name in ("w1", "v1", "w2"):
        names[f"{block}.experts.mlp.{name}"] = (EXPERTS * INNER, HIDDEN)
        names[f"{block}.experts.mlp.{name}.scale"] = (EXPERTS * INNER, 1)
    config = SimpleNamespace(
        neuron_config=SimpleNamespace(glu_mlp=True, tp_degree=1),
        n_layers=LAYERS,
        d_model=HIDDEN,
        ffn_config=SimpleNamespace(moe_num_experts=EXPERTS, ffn_hidden_size=INNER),
    )

    converted = dbrx.convert_dbrx_to_neuron_state_dict(
        {name: torch.ones(shape) for name, shape in names.items()}, config
    )

    assert "layers.0.ffn.expert_mlps.mlp_op.down_proj.weight" in converted
    assert not [name for name in converted if "scale" in name]


def test_gpt_oss_converter_takes_mxfp4_alone(target: Target) -> None:
    gpt_oss = upstream_model(target, "gpt_oss", since=(0, 7))
    layer = "layers.0"
    in_bfloat16 = {
        f"{layer}.input_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}.post_attention_layernorm.weight": torch.ones(HIDDEN),
        f"{layer}.self_attn.sinks": torch.ones(2),
        f"{layer}.mlp.router.weight": torch.ones(EXPERTS, HIDDEN),
        f"{layer}.mlp.router.bias": torch.ones(EXPERTS),
        f"{layer}.mlp.experts.gate_up_proj": torch.ones(EXPERTS, HIDDEN, 2 * INNER),
        f"{layer}.mlp.experts.down_proj": torch.ones(EXPERTS, INNER, HIDDEN),
    }
    config = SimpleNamespace(
        neuron_config=SimpleNamespace(is_mxfp4_compute=False, attention_dp_degree=1, cp_degree=1),
        num_hidden_layers=LAYERS,
        original_hidden_size=HIDDEN,
    )

    with pytest.raises(KeyError, match=r"experts\.down_proj_blocks"):
        gpt_oss.convert_hf_format_state_dict_bf16_compute(in_bfloat16, config)
