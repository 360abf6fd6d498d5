"""Only whole checkpoints are read: found out from names, dtypes and shapes alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale import CheckpointError, quantize_checkpoint
from nxdi_expertscale.checkpoint.read.model import open_model
from tests.harness import checkpoints

LAYER = "model.layers.1"


def refusal(folder: Path, values: checkpoints.Tensors, **config: Any) -> str:
    checkpoints.save(folder, values, config=config)
    with pytest.raises(CheckpointError) as error:
        open_model(folder)
    return str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.input_layernorm.weight",
        f"{LAYER}.post_attention_layernorm.weight",
        f"{LAYER}.self_attn.k_norm.weight",
        *(f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkvo"),
        f"{LAYER}.mlp.gate.weight",
        f"{LAYER}.mlp.experts.3.down_proj.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_each_tensor_is_missed(tmp_path: Path, name: str) -> None:
    values = checkpoints.tensors()
    del values[name]

    message = refusal(tmp_path, values)

    assert name.removeprefix("model.") in message
    assert "is missing" in message


def test_a_layer_without_attention_is_told(tmp_path: Path) -> None:
    values = {n: v for n, v in checkpoints.tensors().items() if f"{LAYER}.self_attn" not in n}

    assert "layer 1: has no self_attn, and layer 0 has" in refusal(tmp_path, values)


def test_a_model_without_attention_is_told(tmp_path: Path) -> None:
    values = {n: v for n, v in checkpoints.tensors().items() if ".self_attn." not in n}

    assert "layer 0: has no attention, nor anything in its place" in refusal(tmp_path, values)


def test_a_bias_that_one_layer_has_is_missed_in_the_other(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    values["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)

    assert f"{LAYER}.self_attn.q_proj.bias: is missing" in refusal(tmp_path, values)


def test_another_shape_than_in_the_other_layers_is_told(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    values[f"{LAYER}.self_attn.q_norm.weight"] = torch.ones(8)

    assert "self_attn.q_norm.weight: has shape [" in refusal(tmp_path, values)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        *((f"self_attn.{p}_proj", f"{p}_proj.weight: is missing, and ") for p in "qkvo"),
        ("input_layernorm", "lacks a norm: .*only post_attention_layernorm"),
        ("layernorm", "lacks a norm: .*there is none"),
    ],
)
def test_what_every_layer_lacks_is_missed(tmp_path: Path, part: str, message: str) -> None:
    values = {name: v for name, v in checkpoints.tensors().items() if part not in name}

    assert re.search(message, refusal(tmp_path, values))


@pytest.mark.parametrize(
    ("part", "edit"),
    [
        ("q_proj", lambda v: v[:32]),
        ("k_proj", lambda v: v[:16]),
        ("v_proj", lambda v: v[:16]),
        ("o_proj", lambda v: v.t()),
        ("o_proj", lambda v: v[:, :32]),
        ("input_layernorm", lambda v: v[:40]),
        ("input_layernorm", lambda v: v[None]),
        ("q_norm", lambda v: v[:8]),
    ],
)
def test_a_shape_of_every_layer_is_held_to_the_config(
    tmp_path: Path, part: str, edit: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    values = {
        name: edit(value).contiguous() if part in name else value
        for name, value in checkpoints.tensors().items()
    }

    assert f"{part}.weight: has shape [" in refusal(tmp_path, values)


def test_queries_may_have_a_gate_and_norms_may_go_over_all_heads(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    for layer in range(checkpoints.LAYERS):
        attention = f"model.layers.{layer}.self_attn"
        queries = values[f"{attention}.q_proj.weight"]
        values[f"{attention}.q_proj.weight"] = torch.cat([queries, queries])
        values[f"{attention}.k_norm.weight"] = torch.ones(32)

    open_model(checkpoints.save(tmp_path, values))


@pytest.mark.parametrize("other", ["language_model.model.layers.0", "model.layers.00", "layers.0"])
def test_a_tensor_behind_another_prefix_is_told(tmp_path: Path, other: str) -> None:
    values = checkpoints.tensors()
    name = "input_layernorm.weight"
    values[f"{other}.{name}"] = values[f"model.layers.0.{name}"].clone()

    assert "as well; remove one of the two" in refusal(tmp_path, values)


def test_a_bias_of_one_expert_is_missed_in_the_others(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    values[f"{LAYER}.mlp.experts.1.up_proj.bias"] = torch.ones(checkpoints.INNER)

    message = refusal(tmp_path, values)

    assert "layers.1.mlp.experts.0.up_proj.bias: is missing" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.bool])
@pytest.mark.parametrize("name", [f"{LAYER}.input_layernorm.weight", "model.norm.weight"])
def test_norms_are_floats(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    values = checkpoints.tensors()
    values[name] = values[name].to(dtype)

    assert f"{name}: is " in refusal(tmp_path, values)


@pytest.mark.parametrize("prefix", ["mtp.", "x.model."])
def test_what_stands_elsewhere_is_no_part_of_a_layer(tmp_path: Path, prefix: str) -> None:
    values = checkpoints.tensors()
    name = "layers.1.mlp.experts.2.up_proj.weight"
    values[f"{prefix}{name}"] = values.pop(f"model.{name}")

    assert f"{name}: is missing" in refusal(tmp_path, values)


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", f"{LAYER}.mlp.experts.2.up_proj.weight", f"{LAYER}.mlp.gate.weight"],
)
def test_a_tensor_under_two_names_is_told(tmp_path: Path, name: str) -> None:
    values = checkpoints.tensors()
    values[name.removeprefix("model.")] = values[name].clone()

    assert "as well; remove one of the two" in refusal(tmp_path, values)


def test_layers_of_different_kinds_may_differ(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    name = f"{LAYER}.self_attn.q_norm.weight"
    values[name] = torch.ones(8, dtype=torch.bfloat16)
    kinds = ["full_attention", "sliding_attention"]
    checkpoints.save(tmp_path / "other", values, config={"layer_types": kinds})
    for part in "qkv":
        old = values.pop(f"{LAYER}.self_attn.{part}_proj.weight")
        values[f"{LAYER}.linear_attn.in_{part}.weight"] = old
    del values[f"{LAYER}.self_attn.o_proj.weight"], values[name]
    del values[f"{LAYER}.self_attn.k_norm.weight"]
    checkpoints.save(tmp_path / "linear", values)

    open_model(tmp_path / "other")
    open_model(tmp_path / "linear")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "vocab.json"])
def test_what_lies_beside_the_weights_is_parsed_before_any_is_written(
    tmp_path: Path, name: str
) -> None:
    src = checkpoints.save(tmp_path / "src")
    (src / name).write_text('{"cut off": ')

    with pytest.raises(CheckpointError, match=f"{name}: is not valid JSON"):
        quantize_checkpoint(src, tmp_path / "dst")

    assert not (tmp_path / "dst").exists()


class TestWhatASourceKept:
    """What a quantized source has in full precision was left out on purpose."""

    @pytest.fixture
    def src(self, tmp_path: Path) -> Path:
        whole = checkpoints.tensors()
        values = checkpoints.by_channel(whole)
        kept = ("lm_head", f"{LAYER}.self_attn.v_proj", f"{LAYER}.mlp.experts")
        for name in whole:
            if name.startswith(kept):
                values[name] = whole[name]
                values.pop(f"{name}_scale", None)
        config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
        return checkpoints.save(tmp_path / "src", values, config=config)

    def test_it_stays_so_and_is_listed(self, src: Path, tmp_path: Path) -> None:
        from nxdi_expertscale.checkpoint import mismatch, neuron_settings, verify_checkpoint

        result = quantize_checkpoint(src, tmp_path / "dst")

        expected = {"lm_head", "layers.1.self_attn.v_proj", "layers.1.mlp.experts"}
        assert expected <= set(result.modules_to_not_convert)
        found, source = checkpoints.load(tmp_path / "dst"), checkpoints.load(src)
        for name in ("lm_head.weight", f"{LAYER}.mlp.experts.0.up_proj.weight"):
            assert torch.equal(found[name], source[name])
        settings = neuron_settings(tmp_path / "dst").neuron_config
        assert expected <= set(settings["modules_to_not_convert"])
        assert verify_checkpoint(tmp_path / "dst", src).faults == ()
        assert mismatch(tmp_path / "dst", src, []) is None
        assert mismatch(tmp_path / "dst", src, settings["modules_to_not_convert"]) is None
        ignored = json.loads((tmp_path / "dst" / "config.json").read_text())
        assert f"{LAYER}.self_attn.v_proj" in ignored["quantization_config"]["ignore"]


def test_a_quantized_embedding_is_dequantized(tmp_path: Path) -> None:
    values = checkpoints.by_channel(checkpoints.tensors())
    name = "model.embed_tokens.weight"
    values |= {
        name: torch.ones(checkpoints.VOCABULARY, checkpoints.HIDDEN).to(torch.float8_e4m3fn),
        f"{name}_scale": torch.full((checkpoints.VOCABULARY, 1), 0.5),
    }
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
    checkpoints.save(tmp_path / "src", values, config=config)

    result = quantize_checkpoint(tmp_path / "src", tmp_path / "dst")

    assert result.tensors["dequantized"] == 1
    found = checkpoints.load(tmp_path / "dst")[name]
    assert found.dtype == torch.bfloat16
    assert bool((found == 0.5).all())


def test_a_scale_that_cannot_be_doubled_is_told(tmp_path: Path) -> None:
    values = checkpoints.by_channel(checkpoints.tensors())
    values["lm_head.weight_scale"] = torch.full((checkpoints.VOCABULARY, 1), 3e38)
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG}
    src = checkpoints.save(tmp_path / "src", values, config=config)

    with pytest.raises(CheckpointError, match=r"lm_head\.weight_scale: has "):
        quantize_checkpoint(src, tmp_path / "dst")
