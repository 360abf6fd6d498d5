"""What is refused from names, dtypes and shapes, before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints
from tests.harness.checkpoints import Tensors

EXPERT = "model.layers.1.mlp.experts.2"


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda values: {n: v for n, v in values.items() if n != name}


def having(name: str, value: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda values: {**values, name: value}


def refused(tmp_path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    assert str(tmp_path / "src") in str(error.value)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{EXPERT}.up_proj.weight"), r"1\.mlp\.experts\.2\.up_proj\.weight: is missing"),
        (
            lambda values: {n: v for n, v in values.items() if "layers.1.mlp.experts" not in n},
            r"layers\.1\.mlp\.experts\.0\.gate_proj\.weight: is missing, one of 12 of 12",
        ),
        (without("model.layers.0.mlp.gate.weight"), r"0\.mlp\.gate\.weight: is missing"),
        (without("model.embed_tokens.weight"), r"embed_tokens\.weight: is missing"),
        (without("lm_head.weight"), r"lm_head\.weight: is missing"),
        (
            having("model.layers.0.mlp.experts.4.up_proj.weight", torch.ones(40, 48)),
            r"experts\.4\.up_proj\.weight: is there, and config.json says 4 experts",
        ),
        (
            having("model.layers.0.mlp.gate.e_score_correction_bias", torch.ones(3)),
            r"e_score_correction_bias: has shape \[3\], and config.json says \[4\]",
        ),
        (
            having(f"{EXPERT}.up_proj.weight", torch.ones(41, 48)),
            r"has shape \[41, 48\], and config.json says \[40, 48\]",
        ),
        (
            having("lm_head.weight", torch.ones(64, 32)),
            r"lm_head\.weight: has shape \[64, 32\], and config.json says \[64, 48\]",
        ),
        (
            having("model.layers.0.mlp.gate.weight", torch.ones(3, 48)),
            r"gate\.weight: has shape \[3, 48\], and config.json says \[4, 48\]",
        ),
        (
            having(f"{EXPERT}.up_proj.weight", torch.ones(40, 48, dtype=torch.int8)),
            r"up_proj\.weight: is I8; a weight has to be BF16, F16, F32 or F8_E4M3",
        ),
        (
            having("lm_head.weight", torch.ones(64, 48, dtype=torch.float64)),
            r"lm_head\.weight: is F64",
        ),
        (
            having("lm_head.weight", torch.ones(64, 48).to(torch.float8_e5m2)),
            r"lm_head\.weight: is F8_E5M2",
        ),
        (
            having("lm_head.weight", torch.ones(64, 48).to(torch.float8_e4m3fn)),
            r"lm_head\.weight: is F8_E4M3 and has no scale",
        ),
        (having("model.extra", torch.ones(0, 3)), r"model\.extra: has shape \[0, 3\]"),
        (
            having("lm_head.weight_scale", torch.ones(64, 1)),
            r"lm_head\.weight: has scales and is BF16",
        ),
        (
            having("model.layers.0.mlp.up_proj.weight_scale", torch.ones(64, 1)),
            r"its weight model\.layers\.0\.mlp\.up_proj\.weight is missing",
        ),
        (
            having("lm_head.input_scale", torch.ones(1)),
            r"lm_head\.input_scale: static scales of activations are not supported",
        ),
    ],
)
def test_tensors_that_do_not_make_a_model_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    checkpoints.save(tmp_path / "src", change(checkpoints.tensors()))

    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(63, 1), r"shape \[63, 1\], and has to have \[64\] or \[64, 1\]"),
        (torch.ones(64, 2), r"shape \[64, 2\]"),
        (torch.ones(64, 1, dtype=torch.int32), "float scales, not .* and I32"),
    ],
)
def test_scales_that_do_not_fit_are_refused(
    tmp_path: Path, scale: torch.Tensor, message: str
) -> None:
    values = checkpoints.by_channel(checkpoints.tensors()) | {"lm_head.weight_scale": scale}
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    refused(tmp_path, message)


def test_block_scales_that_do_not_cover_the_weight_are_refused(tmp_path: Path) -> None:
    values = checkpoints.in_blocks(checkpoints.tensors())
    values["lm_head.weight_scale_inv"] = torch.ones(4, 2)
    config = {"quantization_config": checkpoints.BLOCKS_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    refused(tmp_path, r"weight_scale_inv has shape \[4, 2\], and has to have \[4, 3\]")


def test_two_scales_of_one_weight_are_refused(tmp_path: Path) -> None:
    values = checkpoints.in_blocks(checkpoints.tensors())
    values["lm_head.weight_scale"] = torch.ones(64, 1)
    config = {"quantization_config": checkpoints.BLOCKS_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    refused(tmp_path, r"lm_head\.weight has another scale")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen3"}, "'qwen3' is not a mixture-of-experts model that is supported"),
        ({"model_type": None}, "supported are: .*qwen3_moe"),
        ({"num_experts": None}, "does not say how many experts"),
        ({"num_experts": 0}, "does not say how many experts"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', not a size"),
        ({"hidden_size": -1}, "hidden_size is -1, not a size"),
        ({"hidden_size": 10**30}, "hidden_size is 1000000"),
        ({"quantization_config": []}, r"quantization_config is \[\], not an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized as 'awq' cannot be read"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-q"}},
            "quantized as .int-q. cannot be read",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
            r"weight_block_size \[128, 0\] is not two sizes",
        ),
    ],
)
def test_configs_of_other_models_are_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    checkpoints.save(tmp_path / "src", config=config)

    refused(tmp_path, message)


def test_a_layer_without_experts_may_be_dense(tmp_path: Path) -> None:
    values = {n: v for n, v in checkpoints.tensors().items() if "layers.1.mlp" not in n}
    for projection, shape in (("gate", (96, 48)), ("up", (96, 48)), ("down", (48, 96))):
        values[f"model.layers.1.mlp.{projection}_proj.weight"] = torch.ones(shape)
    checkpoints.save(tmp_path / "src", values, config={"mlp_only_layers": [1]})

    result = quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    assert result.tensors["quantized experts"] == 3 * checkpoints.EXPERTS
    assert "model.layers.1.mlp.gate_proj.weight_scale" in checkpoints.load(tmp_path / "dst")


def test_mixtrals_names_are_known(tmp_path: Path) -> None:
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    values = {}
    for name, value in checkpoints.tensors().items():
        module = name.replace(".mlp.", ".block_sparse_moe.")
        for ours, theirs in parts.items():
            module = module.replace(f".{ours}.", f".{theirs}.")
        values[module] = value
    config = {**checkpoints.CONFIG, "model_type": "mixtral", "num_local_experts": 4}
    config["intermediate_size"] = config.pop("moe_intermediate_size")
    del config["num_experts"]
    checkpoints.save(tmp_path / "src", values)
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))

    quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    found = checkpoints.load(tmp_path / "dst")
    assert found["model.layers.0.block_sparse_moe.experts.3.w2.weight_scale"].shape == (48, 1)
    assert found["model.layers.0.block_sparse_moe.gate.weight"].dtype == torch.bfloat16
