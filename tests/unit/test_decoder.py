"""The reference on a CPU against Hugging Face's own classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from nxdi_expertscale.checkpoint.read.config import read_config
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.evaluation import decoder
from nxdi_expertscale.evaluation.architecture import (
    LM_HEAD,
    Architecture,
    context_length,
    derive_architecture,
)
from nxdi_expertscale.families.built_in import LLAMA4, MIXTRAL, QWEN3_MOE
from nxdi_expertscale.families.built_in.contributed import GLM4_MOE, MINIMAX_M2, OLMOE
from nxdi_expertscale.families.declaration import MoEFamily
from tests.harness import checkpoints

ROUNDING = 1e-5
TOKENS = torch.randint(128, (2, 24), generator=torch.Generator().manual_seed(3))

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
}
OF_OLMOE = {
    **{name: value for name, value in SIZES.items() if name != "head_dim"},
    "num_experts": 8,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
QWEN3 = {**SIZES, "num_experts": 8, "moe_intermediate_size": 32, "intermediate_size": 96}


def architecture(config: dict[str, Any], family: MoEFamily = QWEN3_MOE) -> Architecture:
    return derive_architecture(read_config(config, family, "folder/config.json"), family)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (Qwen3MoeConfig(**QWEN3, norm_topk_prob=True), QWEN3_MOE),
        (Qwen3MoeConfig(**QWEN3, norm_topk_prob=False, rope_theta=1e6), QWEN3_MOE),
        (Qwen3MoeConfig(**QWEN3, attention_bias=True, tie_word_embeddings=True), QWEN3_MOE),
        (Qwen3MoeConfig(**QWEN3, mlp_only_layers=[1]), QWEN3_MOE),
        (Qwen3MoeConfig(**QWEN3, decoder_sparse_step=2), QWEN3_MOE),
        (MixtralConfig(**SIZES, num_local_experts=8, intermediate_size=48), MIXTRAL),
        (OlmoeConfig(**OF_OLMOE), OLMOE),
        (OlmoeConfig(**OF_OLMOE, norm_topk_prob=True), OLMOE),
    ],
    ids=[
        *("qwen3", "unnormalized", "bias, tied", "mlp_only", "sparse_step", "mixtral"),
        *("olmoe", "olmoe, normalized"),
    ],
)
def test_logits_agree_with_hugging_face(
    config: PretrainedConfig, family: MoEFamily, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    # The files name each expert; in memory transformers 5 holds a layer's as one.
    reference.save_pretrained(tmp_path)
    stored = checkpoints.load(tmp_path)
    weights = {name.removeprefix("model."): value for name, value in stored.items()}
    model = architecture(config.to_dict(), family)

    with torch.no_grad():
        found = decoder.forward(TOKENS, weights.__getitem__, model)
        expected = reference(TOKENS).logits

    assert float((found - expected).norm() / expected.norm()) < ROUNDING
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    taken = dict(model.shapes())
    assert {**shapes, **taken} == shapes
    assert set(shapes) - set(taken) <= {LM_HEAD}


def test_rope_settings_of_transformers_5_are_read() -> None:
    old = Qwen3MoeConfig(**QWEN3, rope_theta=5e5).to_dict()
    new = {name: value for name, value in old.items() if not name.startswith("rope")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}

    assert architecture(new) == architecture(old)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_scaling is 'yarn'"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("clip_qkv", 8.0, "clip_qkv is 8.0"),
        ("rms_norm_eps", None, "has no rms_norm_eps"),
        ("num_experts", None, "how many experts"),
        ("num_key_value_heads", 3, "is 4, no multiple of num_key_value_heads, which is 3"),
        ("head_dim", 23, "a head has 23 channels"),
        ("num_attention_heads", 1 << 20, "is 25165824, more than any model has"),
        ("hidden_size", 1 << 30, "hidden_size is 1073741824, more than any model has"),
        ("moe_intermediate_size", 1 << 30, "more than any model has"),
        ("vocab_size", 1 << 30, "vocab_size is 1073741824, more than any model has"),
        ("num_experts_per_tok", 9, "a token goes to 9 of 8 experts"),
    ],
)
def test_what_it_cannot_compute_is_refused(setting: str, value: Any, message: str) -> None:
    # As transformers 4 writes it, in whichever release.
    of_transformers_5 = {"rope_parameters", "num_local_experts"}
    usual = {"rope_theta": 1e4, **Qwen3MoeConfig(**QWEN3).to_dict(), **QWEN3}
    config = {name: usual[name] for name in usual.keys() - of_transformers_5} | {setting: value}

    with pytest.raises(CheckpointError, match=f"folder/config.json: .*{message}"):
        architecture(config)


@pytest.mark.parametrize("family", [LLAMA4, GLM4_MOE, MINIMAX_M2], ids=lambda family: family.name)
def test_family_that_it_does_not_know_is_refused(family: MoEFamily) -> None:
    config = {**QWEN3, "num_local_experts": 8, "n_routed_experts": 8}

    with pytest.raises(CheckpointError, match=rf"family {family.name} .*verify with against"):
        architecture(config, family)


def test_context_ends_where_a_sliding_window_would_begin() -> None:
    def length(**settings: Any) -> int:
        return context_length(read_config({**QWEN3, **settings}, QWEN3_MOE, "config.json"))

    assert length(sliding_window=16, use_sliding_window=False) == 64
    assert length(sliding_window=16) == 16
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        length(max_position_embeddings=None)


def test_experts_without_tokens_are_not_asked_for() -> None:
    config = Qwen3MoeConfig(**QWEN3, norm_topk_prob=True)
    model = dataclasses.replace(architecture(config.to_dict()), num_hidden_layers=1)
    shapes, asked = dict(model.shapes()), set[str]()

    def weights(name: str) -> torch.Tensor:
        asked.add(name)
        return torch.randn(shapes[name], generator=torch.Generator().manual_seed(0))

    decoder.mlp(torch.randn(1, model.hidden_size), weights, 0, model)

    experts = {place.expert for name in asked if (place := QWEN3_MOE.names.parse_expert_key(name))}
    assert len(experts) == model.num_experts_per_tok
