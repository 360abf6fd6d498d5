"""A checkpoint of a model whose family is known, each expert under its own name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from nxdi_expertscale.checkpoint.read.files import CONFIG, Checkpoint, open_checkpoint
from nxdi_expertscale.checkpoint.read.tensors import FLOATS
from nxdi_expertscale.checkpoint.safetensors_format import ITEM_SIZES, StoredTensor
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily, Stacking
from nxdi_expertscale.families.lookup import require_family
from nxdi_expertscale.plugins.manager import known_families

MAX_TENSORS = 1 << 20
"""More than any real model has, each expert's counted."""


def open_model(folder: str | os.PathLike[str]) -> tuple[Checkpoint, MoEFamily]:
    """Read the headers of a checkpoint and find its family.

    Experts that are stored as one tensor for all of a layer are given one by one: each is a
    tensor of its own that lies within the stored one. Nothing is copied.

    Raises:
        CheckpointError: It is not a checkpoint, or not one of a supported model.
    """
    checkpoint = open_checkpoint(folder)
    where = str(checkpoint.folder / CONFIG)
    family = require_family(checkpoint.config.get("model_type"), known_families(), where)
    tensors: dict[str, StoredTensor] = {}
    for stored in checkpoint.tensors.values():
        for tensor in _one_by_one(checkpoint, family, stored):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{checkpoint.folder / stored.file}: {stored.name}: has {tensor.name} in it, "
                    f"which is in {tensors[tensor.name].file} as well; remove one of them"
                )
            tensors[tensor.name] = tensor
            if len(tensors) > MAX_TENSORS:
                raise CheckpointError(
                    f"{checkpoint.folder}: has more than {MAX_TENSORS} tensors, which no real "
                    "model has; download it again"
                )
    return replace(checkpoint, tensors=tensors), family


def _one_by_one(
    checkpoint: Checkpoint, family: MoEFamily, stored: StoredTensor
) -> Iterator[StoredTensor]:
    place = family.names.parse_stacked_key(stored.name)
    if place is None:
        yield stored
        return
    where = f"{checkpoint.folder / stored.file}: {stored.name}"
    if stored.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: is {stored.dtype}, and holds all experts of a layer; so only "
            f"{', '.join(FLOATS)} can be read, use the original checkpoint"
        )
    _, fused = place
    projections = family.fused[fused]
    experts = family.experts_of(checkpoint.config)
    if len(stored.shape) != 3 or stored.shape[0] != experts:
        raise CheckpointError(
            f"{where}: has shape {list(stored.shape)}, and {CONFIG} says {experts} experts, which "
            f"makes it {family.stacked.value if family.stacked else None}; download it again"
        )
    _, outputs, inputs = stored.shape
    if family.stacked is Stacking.INPUTS_FIRST:
        inputs, outputs = outputs, inputs
    size, rest = divmod(outputs, len(projections))
    if rest:
        raise CheckpointError(
            f"{where}: has {outputs} outputs, which are not {' and '.join(projections)} of one "
            "size; download it again"
        )
    path, item = stored.name.removesuffix(f".{fused}"), ITEM_SIZES[stored.dtype]
    transposed = family.stacked is Stacking.INPUTS_FIRST
    for expert in range(experts):
        start = stored.offset + expert * outputs * inputs * item
        for number, projection in enumerate(projections):
            yield StoredTensor(
                name=f"{path}.{expert}.{projection}.weight",
                dtype=stored.dtype,
                shape=(size, inputs),
                file=stored.file,
                offset=start + number * size * item * (1 if transposed else inputs),
                pitch=outputs if transposed else None,
            )
