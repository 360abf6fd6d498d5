"""Models that are refused when a checkpoint of theirs is to be quantized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nxdi_expertscale import CheckpointError, quantize_checkpoint


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("dbrx", "drops every scale.*; run it in bfloat16"),
        ("gpt_oss", "MXFP4"),
        ("glm_moe_dsa", r"GLM-5\.2/src/modeling_glm5\.py: gate_w = .*its converter has to keep"),
        ("afmoe", r"modeling_trinity\.py: gate_w = .*have its converter keep the dtype"),
        ("phimoe", r"modeling_phimoe\.py: target_dtype = torch\.bfloat16"),
        ("laguna", "pull request 158, .*: gate_w = "),
        ("minimax_m3", "takes the scale of an expert"),
        ("llama", "supported are: .*qwen3_moe.*declares a MoEFamily .*'Adding a model'"),
        ("mine_moe", "supported are: .*qwen3_moe.*declares a MoEFamily .*'Adding a model'"),
    ],
)
def test_unsupported_model_is_refused_with_the_reason(
    tmp_path: Path, model_type: str, message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"a.weight": torch.ones(2, 2)}, folder / "model.safetensors")

    with pytest.raises(
        CheckpointError, match=rf"config.json: model_type '{model_type}'.*{message}"
    ):
        quantize_checkpoint(folder, tmp_path / "fp8")
    assert not (tmp_path / "fp8").exists()
