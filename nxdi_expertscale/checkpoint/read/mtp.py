"""Tensors that predict further tokens (multi-token prediction, MTP), which are not the model's.

NxDI's models do not have these layers. They stand in a checkpoint as layers beyond the last one,
or beneath ``mtp``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import replace

from nxdi_expertscale.checkpoint.read.config import ModelConfig
from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.families.declaration import MoEFamily

_logger = logging.getLogger("nxdi_expertscale")


def without_mtp(files: WeightFiles, config: ModelConfig, family: MoEFamily) -> WeightFiles:
    """Leave out the tensors that predict further tokens, their scales among them."""
    _warn_of_plain_layers(files, config, family)
    return replace(
        files,
        tensors={
            name: tensor
            for name, tensor in files.tensors.items()
            if not family.names.is_mtp_key(name, config.num_hidden_layers)
        },
    )


def _warn_of_plain_layers(files: WeightFiles, config: ModelConfig, family: MoEFamily) -> None:
    """Warn of layers beyond the last one that have no more parts than the model's own have.

    One that predicts further tokens joins two inputs (``eh_proj``, ``enorm``, ``hnorm``).
    """
    parts: dict[int, set[str]] = defaultdict(set)
    for name in files.tensors:
        place = family.names.parse_layer_key(name)
        if place is not None:
            parts[place[0]].add(place[1].partition(".")[0])
    own = {
        part for layer, found in parts.items() if layer < config.num_hidden_layers for part in found
    }
    plain = [n for n, found in parts.items() if n >= config.num_hidden_layers and found <= own]
    if plain:
        _logger.warning(
            "%s: layers from %d on are left out, because config.json says %d layers; they look "
            "like layers of the model: check num_hidden_layers",
            files.folder.path,
            min(plain),
            config.num_hidden_layers,
        )
