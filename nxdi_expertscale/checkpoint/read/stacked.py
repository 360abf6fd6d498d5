"""Experts that are stored as one tensor for all of a layer, seen as one tensor each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nxdi_expertscale.checkpoint.read.config import ModelConfig
from nxdi_expertscale.checkpoint.read.files import CONFIG, WeightFiles
from nxdi_expertscale.checkpoint.read.tensors import FLOATS
from nxdi_expertscale.checkpoint.safetensors_format import ITEM_SIZES, StoredTensor
from nxdi_expertscale.errors import CheckpointError, damaged
from nxdi_expertscale.families.declaration import MoEFamily, Stacking

MAX_TENSORS = 1 << 20
"""More than any real model has, each expert's counted."""


def unstack_experts(files: WeightFiles, config: ModelConfig, family: MoEFamily) -> WeightFiles:
    """Give each stacked expert a tensor of its own, which lies within the stored one.

    Nothing is read or copied.

    Raises:
        CheckpointError: A stacked tensor has another dtype or shape than experts have, or an
            expert is stored twice.
    """
    tensors: dict[str, StoredTensor] = {}
    for stored in files.tensors.values():
        for tensor in _experts_in(files, config, family, stored):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{files.location(stored)}: has {tensor.name} in it, which is in "
                    f"{tensors[tensor.name].file} as well; remove one of them"
                )
            tensors[tensor.name] = tensor
            if len(tensors) > MAX_TENSORS:
                raise damaged(
                    files.folder.path,
                    f"has more than {MAX_TENSORS} tensors, which no real model has",
                )
    return replace(files, tensors=tensors)


def _experts_in(
    files: WeightFiles, config: ModelConfig, family: MoEFamily, stored: StoredTensor
) -> Iterator[StoredTensor]:
    """Each expert's weight ``[out, in]`` in a stacked tensor; any other tensor as it is."""
    place = family.names.parse_stacked_key(stored.name)
    if place is None:
        yield stored
        return
    where = files.location(stored)
    if stored.dtype not in FLOATS:
        raise CheckpointError(
            f"{where}: is {stored.dtype}, and holds all experts of a layer; so only "
            f"{', '.join(FLOATS)} can be read, use the original checkpoint"
        )
    _, fused = place
    projections = family.fused[fused]
    if len(stored.shape) != 3 or stored.shape[0] != config.num_experts:
        raise damaged(
            where,
            f"has shape {list(stored.shape)}, and {CONFIG} says {config.num_experts} experts, "
            f"which makes it {family.stacked.value if family.stacked else None}",
        )
    _, outputs, inputs = stored.shape
    is_transposed = family.stacked is Stacking.INPUTS_FIRST
    if is_transposed:
        inputs, outputs = outputs, inputs
    size, rest = divmod(outputs, len(projections))
    if rest:
        raise damaged(
            where, f"has {outputs} outputs, which are not {' and '.join(projections)} of one size"
        )
    path, item_size = stored.name.removesuffix(f".{fused}"), ITEM_SIZES[stored.dtype]
    for expert in range(config.num_experts):
        start = stored.offset + expert * outputs * inputs * item_size
        for number, projection in enumerate(projections):
            yield StoredTensor(
                name=f"{path}.{expert}.{projection}.weight",
                dtype=stored.dtype,
                shape=(size, inputs),
                file=stored.file,
                offset=start + number * size * item_size * (1 if is_transposed else inputs),
                stride=outputs if is_transposed else None,
            )
