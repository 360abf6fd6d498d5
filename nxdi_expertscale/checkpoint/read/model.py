"""A model's checkpoint, opened and checked once: what every command works on."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nxdi_expertscale.checkpoint.json_files import read_json
from nxdi_expertscale.checkpoint.read.architecture import check_architecture
from nxdi_expertscale.checkpoint.read.attention import check_attention
from nxdi_expertscale.checkpoint.read.config import ModelConfig, read_config
from nxdi_expertscale.checkpoint.read.files import CONFIG, WeightFiles, read_weight_files
from nxdi_expertscale.checkpoint.read.layers import check_layers
from nxdi_expertscale.checkpoint.read.mtp import without_mtp
from nxdi_expertscale.checkpoint.read.scales import Scheme, read_scheme
from nxdi_expertscale.checkpoint.read.stacked import unstack_experts
from nxdi_expertscale.checkpoint.read.tensors import Weight, read_weights
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.lookup import require_family
from nxdi_expertscale.plugins.registry import families_in_force
from nxdi_expertscale.sources.folder import open_folder
from nxdi_expertscale.sources.source import Source


@dataclass(frozen=True)
class Model:
    """A checkpoint of a supported model. Only :func:`open_model` makes one.

    Attributes:
        files: Its files of weights and every tensor in them, each expert's under its own name.
        config: What its ``config.json`` says.
        family: The family that it belongs to.
        scheme: How it is quantized; None if it is not.
        weights: Its weights, each with its scale, in the order of the files.
        mtp_left_out: Number of tensors in the files that predict further tokens, and are not
            among the weights.
    """

    files: WeightFiles
    config: ModelConfig
    family: MoEFamily
    scheme: Scheme | None
    weights: tuple[Weight, ...]
    mtp_left_out: int

    @property
    def folder(self) -> Source:
        """The folder that it lies in, on this host or another."""
        return self.files.folder

    @property
    def has_mtp(self) -> bool:
        """Whether tensors that predict further tokens are among its weights."""
        return any(weight.is_mtp for weight in self.weights)

    @property
    def weights_by_name(self) -> dict[str, Weight]:
        """Its weights by their names, in the order of the files."""
        return {weight.name: weight for weight in self.weights}


def open_model(place: Source | str | os.PathLike[str], *, keep_mtp: bool = True) -> Model:
    """Open a checkpoint and check all that can be checked without reading a weight.

    Args:
        place: A folder with ``config.json`` and safetensors files, in the layout of Hugging Face,
            by its path, or by its source, which has to stay open as long as values are read.
            Experts may be stored one by one, or as one tensor for all of a layer.
        keep_mtp: Whether tensors that predict further tokens are seen, which are not the model's.

    Raises:
        CheckpointError: It is not a checkpoint, or not one of a supported model; a file is
            missing, truncated or garbage; a tensor is missing, or has a dtype, a shape or scales
            that it should not have.
    """
    folder = open_folder(place) if isinstance(place, (str, os.PathLike)) else place
    where = folder.location(CONFIG)
    raw = read_json(folder, CONFIG)
    family = require_family(raw.get("model_type"), families_in_force(), where)
    config = read_config(raw, family, where)
    scheme = read_scheme(config)
    files = unstack_experts(read_weight_files(folder), config, family)
    mtp_left_out = 0
    if not keep_mtp:
        every, files = files, without_mtp(files, config, family)
        mtp_left_out = len(every.tensors) - len(files.tensors)
    weights = read_weights(files, family, scheme, config.num_hidden_layers)
    check_architecture(files, config, family)
    check_layers(files, config, family)
    check_attention(files, config, family)
    return Model(files, config, family, scheme, weights, mtp_left_out)
