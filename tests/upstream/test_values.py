"""A checkpoint with numbers that Neuron cannot compute with, in whatever module they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nxdi_expertscale import CheckpointError

pytestmark = pytest.mark.usefixtures("active")

MODULES = {
    "an expert": "layers.1.mlp.experts.5.down_proj",
    "attention": "layers.1.self_attn.k_proj",
    "the output of attention": "layers.0.self_attn.o_proj",
    "the head": "lm_head",
}
SCALES = {"zero": 0.0, "negative": -1e-3, "infinite": torch.inf, "NaN": torch.nan}


@pytest.fixture(scope="module")
def fp8(nxdi: Any, moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings with which the model is loaded from what NxDI's own step has quantized."""
    return nxdi.quantize(moe, tmp_path_factory.mktemp("fp8"))


def spoil(fp8: dict[str, Any], folder: Path, module: str, suffixes: tuple[str, ...]) -> Any:
    """Copy the checkpoint to a folder; its tensors, the one that is to be spoilt, and settings."""
    tensors = load_file(Path(fp8["quantized_checkpoints_path"]) / "model.safetensors")
    key = next(
        key
        for key in tensors
        if f"model.{key}".endswith(tuple(f"model.{module}.{suffix}" for suffix in suffixes))
    )
    return tensors, key, {**fp8, "quantized_checkpoints_path": str(folder)}


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("where", MODULES)
def test_fp8_beyond_neurons_range_is_refused_by_its_name(
    nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path, where: str, flag: bool
) -> None:
    module = MODULES[where]
    tensors, key, settings = spoil(fp8, tmp_path, module, ("weight",))
    tensors[key].view(torch.uint8)[1, 2] = 0xFA
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=rf"^{module}\.weight: holds FP8 values beyond ±240"):
        nxdi.convert(moe, **settings, expert_wise_scale=flag)


@pytest.mark.parametrize("how", SCALES)
@pytest.mark.parametrize("where", MODULES)
def test_a_scale_that_is_no_positive_number_is_refused_by_its_name(
    nxdi: Any, moe: Path, fp8: dict[str, Any], tmp_path: Path, where: str, how: str
) -> None:
    module = MODULES[where]
    tensors, key, settings = spoil(fp8, tmp_path, module, ("scale", "weight_scale"))
    tensors[key].view(-1)[-1] = SCALES[how]
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=rf"^{module}\.scale: a scale must be finite and po"):
        nxdi.convert(moe, **settings, expert_wise_scale=True)
