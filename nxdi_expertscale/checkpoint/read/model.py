"""A model's checkpoint, opened and checked once: what every command works on."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nxdi_expertscale.checkpoint.json_files import read_json
from nxdi_expertscale.checkpoint.read.architecture import check_architecture
from nxdi_expertscale.checkpoint.read.config import ModelConfig, read_config
from nxdi_expertscale.checkpoint.read.files import CONFIG, WeightFiles, read_weight_files
from nxdi_expertscale.checkpoint.read.layers import check_layers
from nxdi_expertscale.checkpoint.read.scales import Scheme, read_scheme
from nxdi_expertscale.checkpoint.read.stacked import unstack_experts
from nxdi_expertscale.checkpoint.read.tensors import Weight, read_weights
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.lookup import require_family
from nxdi_expertscale.plugins.registry import families_in_force
from nxdi_expertscale.sources.folder import Folder, open_folder


@dataclass(frozen=True)
class Model:
    """A checkpoint of a supported model. Only :func:`open_model` makes one.

    Attributes:
        files: Its files of weights and every tensor in them, each expert's under its own name.
        config: What its ``config.json`` says.
        family: The family that it belongs to.
        scheme: How it is quantized; None if it is not.
        weights: Its weights, each with its scale, in the order of the files.
    """

    files: WeightFiles
    config: ModelConfig
    family: MoEFamily
    scheme: Scheme | None
    weights: tuple[Weight, ...]

    @property
    def folder(self) -> Folder:
        """The folder that it lies in."""
        return self.files.folder


def open_model(path: str | os.PathLike[str]) -> Model:
    """Open a checkpoint and check all that can be checked without reading a weight.

    Args:
        path: A folder with ``config.json`` and safetensors files, in the layout of Hugging Face.
            Experts may be stored one by one, or as one tensor for all of a layer.

    Raises:
        CheckpointError: It is not a checkpoint, or not one of a supported model; a file is
            missing, truncated or garbage; a tensor is missing, or has a dtype, a shape or scales
            that it should not have.
    """
    folder = open_folder(path)
    where = folder.location(CONFIG)
    raw = read_json(folder, CONFIG)
    family = require_family(raw.get("model_type"), families_in_force(), where)
    config = read_config(raw, family, where)
    scheme = read_scheme(config)
    files = unstack_experts(read_weight_files(folder), config, family)
    weights = read_weights(files, family, scheme)
    check_architecture(files, config, family)
    check_layers(files, config, family)
    return Model(files, config, family, scheme, weights)
