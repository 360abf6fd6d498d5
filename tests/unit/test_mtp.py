"""What predicts further tokens, and what NxDI cannot load quantized, told by its place."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from nxdi_expertscale import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.checkpoint.origin import mismatch
from tests.harness import checkpoints
from tests.harness.checkpoints import EXPERTS, HIDDEN, INNER, LAYERS, VOCABULARY, Tensors

BEYOND = f"model.layers.{LAYERS}"
"""The layer after the last one, as DeepSeek-V3 and GLM-4.5 have it."""


def with_mtp(values: Tensors) -> Tensors:
    """A checkpoint with both kinds of layers that predict further tokens."""
    last = f"model.layers.{LAYERS - 1}"
    layer = {name.replace(last, BEYOND): value for name, value in values.items() if last in name}
    own = {
        f"{BEYOND}.eh_proj.weight": torch.ones(HIDDEN, 2 * HIDDEN),
        f"{BEYOND}.embed_tokens.weight": torch.ones(VOCABULARY, HIDDEN),
        f"{BEYOND}.shared_head.head.weight": torch.ones(VOCABULARY, HIDDEN),
        "mtp.layers.0.mlp.experts.0.up_proj.weight": torch.ones(INNER, HIDDEN),
        "mtp.fc.weight": torch.ones(HIDDEN, 2 * HIDDEN),
    }
    return {**values, **layer, **{name: value.bfloat16() for name, value in own.items()}}


def is_mtp(name: str) -> bool:
    return name.startswith((f"{BEYOND}.", "mtp."))


def test_mtp_is_left_out(tmp_path: Path) -> None:
    values = with_mtp(checkpoints.tensors())
    src = checkpoints.save(tmp_path / "src", values)

    result = quantize_checkpoint(src, tmp_path / "fp8")

    assert not [name for name in checkpoints.load(tmp_path / "fp8") if is_mtp(name)]
    assert result.mtp_left_out == len([name for name in values if is_mtp(name)])
    assert verify_checkpoint(tmp_path / "fp8", src).faults == ()
    assert mismatch(tmp_path / "fp8", src, ()) is None


def test_mtp_is_kept_as_it_is(tmp_path: Path) -> None:
    values = with_mtp(checkpoints.tensors())
    src = checkpoints.save(tmp_path / "src", values)

    result = quantize_checkpoint(src, tmp_path / "fp8", keep_mtp=True)

    found = checkpoints.load(tmp_path / "fp8")
    for name in filter(is_mtp, values):
        assert torch.equal(found[name], values[name])
        assert not name.endswith("weight") or f"{name}_scale" not in found
    assert result.mtp_left_out == 0
    assert result.tensors["quantized experts"] == LAYERS * EXPERTS * 3
    assert verify_checkpoint(tmp_path / "fp8", src).faults == ()
    assert mismatch(tmp_path / "fp8", src, ()) is None


def test_quantized_mtp_is_kept_as_numbers(tmp_path: Path) -> None:
    values = with_mtp(checkpoints.in_blocks(checkpoints.tensors()))
    config = {"quantization_config": checkpoints.BLOCKS_CONFIG}
    src = checkpoints.save(tmp_path / "src", values, config=config)

    quantize_checkpoint(src, tmp_path / "fp8", keep_mtp=True)

    found = checkpoints.load(tmp_path / "fp8")
    assert found[f"{BEYOND}.mlp.experts.0.up_proj.weight"].dtype == torch.bfloat16
    assert f"{BEYOND}.mlp.experts.0.up_proj.weight_scale_inv" not in found
    assert verify_checkpoint(tmp_path / "fp8", src).faults == ()


def test_layers_that_look_like_the_models_own_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    src = checkpoints.save(tmp_path / "src", config={"num_hidden_layers": LAYERS - 1})

    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(src, tmp_path / "fp8")

    assert "layers from 1 on are left out, because config.json says 1 layers" in caplog.text


def test_layers_that_predict_tokens_are_no_reason_to_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    src = checkpoints.save(tmp_path / "src", with_mtp(checkpoints.tensors()))

    with caplog.at_level(logging.WARNING):
        quantize_checkpoint(src, tmp_path / "fp8")

    assert caplog.text == ""


def test_what_nxdi_cannot_load_quantized_stays_by_itself(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    added = {
        "model.layers.0.self_attn.q_proj.bias": (64,),
        "model.layers.0.mlp.gate.e_score_correction_bias": (EXPERTS,),
        "model.layers.0.mlp.shared_experts.down_proj.weight": (HIDDEN, INNER),
        "model.layers.0.mlp.shared_expert_gate.weight": (1, HIDDEN),
    }
    for name, shape in added.items():
        for layer in range(LAYERS):
            values[name.replace("layers.0", f"layers.{layer}")] = torch.ones(shape).bfloat16()
    src = checkpoints.save(tmp_path / "src", values)

    quantize_checkpoint(src, tmp_path / "fp8")

    found = checkpoints.load(tmp_path / "fp8")
    kept = ("self_attn.q_proj.weight", *(name.partition("0.")[2] for name in added))
    for layer in range(LAYERS):
        for name in kept:
            path = f"model.layers.{layer}.{name}"
            assert torch.equal(found[path], values[path])
        assert found[f"model.layers.{layer}.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert verify_checkpoint(tmp_path / "fp8", src).faults == ()
