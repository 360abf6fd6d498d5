"""What is read from ``config.json``, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from nxdi_expertscale.checkpoint.read.config import ModelConfig, read_config
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.built_in import LLAMA4, MIXTRAL, QWEN3_MOE
from tests.harness import checkpoints

LEAST = {"model_type": "qwen3_moe", "num_hidden_layers": 3, "hidden_size": 8, "vocab_size": 32}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 6}


def read(**changed: Any) -> ModelConfig:
    return read_config({**LEAST, **EXPERTS, **changed}, QWEN3_MOE, "folder/config.json")


def test_fields_have_the_names_of_hugging_face() -> None:
    raw = {**checkpoints.CONFIG, "rope_theta": 1e6, "sliding_window": 32}

    config = read_config(raw, QWEN3_MOE, "config.json")

    assert {name: getattr(config, name) for name in raw.keys() & vars(config).keys()} == {
        name: value for name, value in raw.items() if name in vars(config)
    }
    assert config.num_key_value_heads == 2
    assert config.dtype == "bfloat16"
    assert config.raw is raw


def test_what_may_be_left_out_has_hugging_faces_meaning() -> None:
    config = read()

    assert (config.num_experts_per_tok, config.head_dim, config.rope_theta) == (None, None, None)
    assert (config.attention_bias, config.tie_word_embeddings) == (False, False)
    assert (config.hidden_act, config.rope_type, config.decoder_sparse_step) == (
        "silu",
        "default",
        1,
    )
    assert config.mlp_only_layers == ()
    assert config.quantization_config is None


def test_null_and_zero_mean_that_there_is_none() -> None:
    config = read(head_dim=None, sliding_window=0, mlp_only_layers=None, attention_bias=None)

    assert config.head_dim is config.sliding_window is None
    assert config.mlp_only_layers == ()
    assert config.attention_bias is False


def test_family_names_the_fields_of_its_experts() -> None:
    sizes = {"num_local_experts": 8, "intermediate_size": 14}
    config = read_config({**LEAST, **EXPERTS, **sizes}, MIXTRAL, "config.json")

    assert (config.num_experts, config.moe_intermediate_size) == (8, 14)
    assert read(intermediate_size=96).moe_intermediate_size == 6


def test_model_that_also_sees_is_described_by_its_language_model() -> None:
    text = {**LEAST, "num_local_experts": 16, "intermediate_size": 5, "tie_word_embeddings": True}
    raw = {"model_type": "llama4", "torch_dtype": "float16", "text_config": text}

    config = read_config(raw, LLAMA4, "config.json")

    assert (config.num_experts, config.hidden_size) == (16, 8)
    assert (config.model_type, config.dtype) == ("llama4", "float16")
    assert config.tie_word_embeddings


@pytest.mark.parametrize(("value", "tied"), [(True, True), (False, False), (1, False)])
def test_embeddings_are_tied_where_the_config_says_so(value: Any, tied: bool) -> None:
    assert read(tie_word_embeddings=value).tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5}, ("default", 5e5)),
        ({"rope_theta": 10000, "rope_scaling": None}, ("default", 1e4)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ("default", 5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}}, ("yarn", 5e5)),
    ],
    ids=["transformers 4", "no scaling", "transformers 5", "scaled"],
)
def test_rope_is_read_in_the_fields_of_every_transformers(
    fields: dict[str, Any], rope: tuple[str, float]
) -> None:
    config = read(**fields)

    assert (config.rope_type, config.rope_theta) == rope


def test_sliding_window_may_be_switched_off() -> None:
    assert read(sliding_window=16).sliding_window == 16
    assert read(sliding_window=16, use_sliding_window=False).sliding_window is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": None}, "does not say how many experts"),
        ({"num_experts": 1 << 17}, "does not say how many experts"),
        ({"moe_intermediate_size": -1}, "does not say how many experts"),
        ({"num_experts_per_tok": 5}, "a token goes to 5 of 4 experts"),
        ({"num_experts_per_tok": 0}, "a token goes to 0 of 4 experts"),
        ({"num_hidden_layers": 1 << 17}, "131072, more than any model has"),
        ({"hidden_size": 8.0}, r"hidden_size is 8\.0, not a size"),
        ({"vocab_size": None}, "vocab_size is None, not a size"),
        ({"head_dim": "16"}, "head_dim is '16', not a size"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', not a number"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0, not a number"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], not an object"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1, not true or false"),
        ({"hidden_act": 3}, "hidden_act is 3, not a string"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1, not a list"),
        ({"mlp_only_layers": ["1"]}, r"mlp_only_layers is \['1'\], not a list of layers"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8', not an object"),
    ],
)
def test_field_of_another_type_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^folder/config.json: .*{message}.*download it"):
        read(**changed)
