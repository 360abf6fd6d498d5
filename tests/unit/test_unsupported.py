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
    [("dbrx", "drops every scale"), ("gpt_oss", "MXFP4"), ("llama", "supported are: .*qwen3_moe")],
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
