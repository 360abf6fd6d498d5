"""The streaming quantizer against NxDI's own step, and its output through NxDI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nxdi_expertscale.checkpoint import neuron_settings, quantize_checkpoint
from tests.harness import checkpoints, models


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by the name that NxDI gives it when it loads."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return {
        name.removeprefix("model.").replace(".weight_scale", ".scale"): value
        for name, value in found.items()
    }


@pytest.fixture(scope="session")
def in_dtype(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def save(dtype: torch.dtype) -> Path:
        folder = tmp_path_factory.mktemp("dtype") / str(dtype)
        models.load(moe).to(dtype).save_pretrained(folder, max_shard_size="100KB")
        return folder

    return save


@pytest.mark.parametrize(
    ("dtype", "excluded"),
    [
        (torch.float32, []),
        (torch.float16, []),
        (torch.bfloat16, []),
        (torch.bfloat16, ["self_attn"]),
        (torch.bfloat16, ["lm_head", "layers.1.mlp.experts"]),
        (torch.bfloat16, ["model.layers.0"]),
        (torch.bfloat16, ["o_proj", "mlp"]),
    ],
)
def test_every_tensor_is_that_of_nxdis_own_step(
    nxdi: Any, in_dtype: Any, tmp_path: Path, dtype: torch.dtype, excluded: list[str]
) -> None:
    source = in_dtype(dtype)
    nxdi.quantize(source, tmp_path / "nxdi", not_converted=[nxdi.ROUTER, *excluded])

    quantize_checkpoint(source, tmp_path / "ours", modules_to_not_convert=excluded)

    expected, found = tensors(tmp_path / "nxdi"), tensors(tmp_path / "ours")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.dtype == torch.float8_e4m3fn:
            assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name
        else:
            # NxDI writes what it does not quantize in float32, whatever it was.
            assert torch.equal(found[name].float(), value), name


def test_the_output_can_be_the_models_own_folder(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    """NxDI reads its config, and is not made to quantize by what is in it for Hugging Face."""
    quantize_checkpoint(moe, tmp_path / "dst")

    config = nxdi.inference_config(tmp_path / "dst", **nxdi.FP8, quantized_checkpoints_path="dst")

    again = type(config).from_json_string(config.to_json_string())
    assert again.num_experts == models.EXPERTS
    assert again.neuron_config.quantization_type == "per_channel_symmetric"


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize(
    ("form", "config", "excluded"),
    [
        (dict, {}, []),
        (dict, {}, ["layers.1.mlp.experts", "layers.0.self_attn"]),
        (checkpoints.in_blocks, {"quantization_config": checkpoints.BLOCKS_CONFIG}, []),
        (checkpoints.by_channel, {"quantization_config": checkpoints.COMPRESSED_CONFIG}, []),
        (checkpoints.by_tensor, {"quantization_config": checkpoints.COMPRESSED_CONFIG}, []),
    ],
)
def test_each_kind_of_output_is_loaded_and_run(
    nxdi: Any, moe: Path, tmp_path: Path, form: Any, config: dict[str, Any], excluded: list[str]
) -> None:
    original = json.loads((moe / "config.json").read_text())
    values = form(checkpoints.load(moe))
    source = checkpoints.save(tmp_path / "source", values, config={**original, **config})
    quantize_checkpoint(source, tmp_path / "dst", modules_to_not_convert=excluded)
    settings = neuron_settings(tmp_path / "dst").neuron_config

    loaded = nxdi.load(moe, **settings)

    # Twice as much where it is the second rounding to FP8.
    nxdi.assert_right(moe, loaded, within=0.06 if form is dict else 0.12)
