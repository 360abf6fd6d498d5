"""A checkpoint in full precision: what an FP8 one stands for."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from nxdi_expertscale.checkpoint.json_files import read_json
from nxdi_expertscale.checkpoint.read.files import CONFIG, INDEX
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.read.values import ValueReader

_FILE = "model-00001-of-00001.safetensors"


def in_full_precision(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint itself, or a copy with its FP8 weights dequantized to float32.

    Args:
        checkpoint: Folder of a small model; the copy is made in memory.
        folder: Where the copy goes, if there is one.
    """
    model = open_model(checkpoint)
    if model.scheme is None:
        return checkpoint
    with TensorReader(model.files) as files:
        reader = ValueReader(model.files, files)
        values = {
            weight.name: reader.values(weight, range(weight.tensor.rows))
            .clone()
            .view(weight.tensor.shape)
            for weight in model.weights
        }
    folder.mkdir()
    save_file(values, folder / _FILE, metadata={"format": "pt"})
    # Some contributed models read no checkpoint without an index.
    index = {"metadata": {}, "weight_map": dict.fromkeys(values, _FILE)}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    config = read_json(model.folder, CONFIG)
    config.pop("quantization_config", None)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return folder
