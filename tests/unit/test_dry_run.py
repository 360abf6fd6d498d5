"""A dry run says what a run would make, without reading a weight or writing a byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from nxdi_expertscale.checkpoint import quantize_checkpoint, run_dry
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.write import full_precision
from nxdi_expertscale.cli.commands import cli
from nxdi_expertscale.cli.exit_status import ExitStatus
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


def test_it_says_what_the_run_then_makes(src: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"modules_to_not_convert": ["layers.0.mlp.experts"], "workers": 2}

    found = run_dry(src, tmp_path / "dst", **settings)

    made = quantize_checkpoint(src, tmp_path / "dst", **settings)
    assert found.output_bytes == found.disk_bytes == made.output_bytes
    assert (found.tensors, found.shards) == (made.tensors, made.shards)
    assert (found.source_bytes, found.workers) == (made.source_bytes, 2)
    assert (found.model_type, found.family) == ("qwen3_moe", "qwen3_moe")
    assert sum(kept.tensors for kept in found.in_full_precision) == made.tensors["kept"]
    assert found.memory_bytes > 1 << 20
    assert found.seconds > 0


@pytest.mark.parametrize("form", [checkpoints.in_blocks, checkpoints.by_channel])
def test_it_tells_of_a_quantized_source(
    tmp_path: Path, form: Callable[[checkpoints.Tensors], checkpoints.Tensors]
) -> None:
    config = {
        checkpoints.in_blocks: checkpoints.BLOCKS_CONFIG,
        checkpoints.by_channel: checkpoints.COMPRESSED_CONFIG,
    }[form]
    values = form(checkpoints.tensors())
    checkpoints.save(tmp_path / "src", values, config={"quantization_config": config})

    found = run_dry(tmp_path / "src", tmp_path / "dst")

    assert found.scheme is not None
    assert found.output_bytes == quantize_checkpoint(tmp_path / "src", tmp_path / "x").output_bytes


def test_it_reads_no_weight_and_writes_nothing(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(TensorReader, "__init__", refuse)
    before = checkpoints.contents(tmp_path)

    run_dry(src, tmp_path / "new" / "dst")

    assert checkpoints.contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


def reasons(src: Path, *exclusions: str) -> dict[str, tuple[str, ...]]:
    found = run_dry(src, src.parent / "dst", modules_to_not_convert=exclusions)
    return {kept.reason: kept.modules for kept in found.in_full_precision}


def test_it_says_why_a_tensor_is_not_quantized(tmp_path: Path) -> None:
    values = checkpoints.tensors()
    for layer in range(checkpoints.LAYERS):
        bias = torch.zeros(64, dtype=torch.bfloat16)
        values[f"model.layers.{layer}.self_attn.q_proj.bias"] = bias
    src = checkpoints.save(tmp_path / "src", values, config={"attention_bias": True})

    found = reasons(src, "layers.0.self_attn.o_proj")

    layers = [f"model.layers.{layer}" for layer in range(checkpoints.LAYERS)]
    assert found[full_precision.ROUTER] == tuple(f"{layer}.mlp.gate" for layer in layers)
    assert found[full_precision.BIASED] == tuple(f"{layer}.self_attn.q_proj" for layer in layers)
    assert found[full_precision.REQUESTED] == ("model.layers.0.self_attn.o_proj",)
    assert "model.norm" in found[full_precision.NOT_LINEAR]
    assert "model.embed_tokens" in found[full_precision.NOT_LINEAR]
    assert len(found) == 4


def test_it_knows_a_tied_output_layer_and_what_a_quantized_source_left_out(tmp_path: Path) -> None:
    values = checkpoints.by_channel(checkpoints.tensors())
    o_proj = "model.layers.0.self_attn.o_proj"
    del values[f"{o_proj}.weight_scale"]
    values[f"{o_proj}.weight"] = checkpoints.tensors()[f"{o_proj}.weight"]
    config = {"quantization_config": checkpoints.COMPRESSED_CONFIG, "tie_word_embeddings": True}

    found = reasons(checkpoints.save(tmp_path / "src", values, config=config))

    assert found[full_precision.BY_SOURCE] == (o_proj,)
    assert found[full_precision.TIED] == ("lm_head",)


def test_it_refuses_what_the_run_refuses(src: Path, tmp_path: Path) -> None:
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "notes.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="is not empty"):
        run_dry(src, tmp_path / "dst")


def test_command_shows_it_and_what_nxdi_gets_wrong(tmp_path: Path) -> None:
    src = checkpoints.save(tmp_path / "src", config={"norm_topk_prob": False})

    result = CliRunner().invoke(cli, ["quantize", str(src), str(tmp_path / "dst"), "--dry-run"])

    assert result.exit_code == 0
    assert "warning: NxDI ignores norm_topk_prob=false" in result.stdout
    assert "2 tensors, 768 bytes: a router, which NxDI cannot load quantized" in result.stdout
    assert not (tmp_path / "dst").exists()


def test_status_says_whether_the_disk_has_room(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    command = ["quantize", str(src), str(tmp_path / "dst"), "--dry-run"]

    shown = CliRunner().invoke(cli, command, standalone_mode=False)
    result = CliRunner().invoke(cli, [*command, "--json"], standalone_mode=False)

    assert shown.return_value is result.return_value is ExitStatus.ANSWER_IS_NO
    assert "1.0 kB free: too little" in shown.stdout
    assert json.loads(result.stdout)["disk_free_bytes"] == 1000
