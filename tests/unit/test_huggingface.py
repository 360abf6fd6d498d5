"""What Hugging Face's own tools make of the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.checkpoint import quantize_checkpoint
from tests.harness import checkpoints

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")


def by_hand(folder: Path) -> checkpoints.Tensors:
    stored = checkpoints.load(folder)
    return {
        name: value.float() * stored.get(f"{name}_scale", torch.tensor(1.0))
        for name, value in stored.items()
        if not name.endswith("_scale")
    }


def keep_activations(folder: Path) -> None:
    """Take the rounding of activations out of the config, which is for GPUs."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("form", "config"),
    [
        (dict, None),
        (checkpoints.in_blocks, {"quantization_config": checkpoints.BLOCKS_CONFIG}),
        (checkpoints.by_channel, {"quantization_config": checkpoints.COMPRESSED_CONFIG}),
    ],
)
@pytest.mark.parametrize("excluded", [[], ["layers.0.mlp.experts", "lm_head"]])
def test_it_loads_as_the_dequantized_model(
    tmp_path: Path, form: Any, config: Any, excluded: list[str]
) -> None:
    src = checkpoints.save(tmp_path / "src", form(checkpoints.tensors()), config=config)
    dst = quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=excluded).destination
    keep_activations(dst)
    dequantized = checkpoints.save(tmp_path / "dequantized", by_hand(dst))
    reference = transformers.AutoModelForCausalLM.from_pretrained(dequantized, dtype=torch.float32)
    tokens = torch.arange(1, 33)[None]

    model = transformers.AutoModelForCausalLM.from_pretrained(dst, dtype=torch.float32)

    # transformers 5 leaves experts that are not quantized in the dtype of the file.
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, reference(tokens).logits)


def test_as_it_is_activations_are_rounded_too(tmp_path: Path) -> None:
    dst = quantize_checkpoint(checkpoints.save(tmp_path / "src"), tmp_path / "dst").destination
    tokens = torch.arange(1, 33)[None]

    rounded = transformers.AutoModelForCausalLM.from_pretrained(dst, dtype=torch.float32)
    keep_activations(dst)
    as_they_are = transformers.AutoModelForCausalLM.from_pretrained(dst, dtype=torch.float32)

    with torch.no_grad():
        logits, expected = rounded(tokens).logits, as_they_are(tokens).logits
    # Of random weights, which add up the rounding of every layer.
    assert 0.01 < (logits - expected).norm() / expected.norm() < 0.3
