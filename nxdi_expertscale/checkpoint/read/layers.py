"""Check that every layer of a checkpoint has what the layers of its kind have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from nxdi_expertscale.checkpoint.read.config import ModelConfig
from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.checkpoint.read.scales import BLOCK_SCALE_SUFFIX, SCALE_SUFFIX
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.errors import CheckpointError, incomplete
from nxdi_expertscale.families.declaration import MoEFamily

LayerKind = tuple[object, ...]
"""What tells layers apart that are built differently."""


def check_layers(files: WeightFiles, config: ModelConfig, family: MoEFamily) -> None:
    """Check that no layer lacks a tensor, or has one of another shape.

    What a layer should have is read from the other layers of its kind. Experts are left out: each
    one is looked for by its number (:mod:`.architecture`).

    Raises:
        CheckpointError: A layer lacks a tensor that layers of its kind have, or has it in another
            shape.
    """
    layers, with_experts = tensors_by_layer(files, config, family)
    kinds: dict[LayerKind, list[int]] = defaultdict(list)
    for layer, tensors in layers.items():
        kinds[config.layer_type(layer), layer in with_experts, _blocks(tensors)].append(layer)
    _check_blocks(files, layers)
    for alike in kinds.values():
        expected: dict[str, StoredTensor] = {}
        for layer in reversed(alike):
            expected |= layers[layer]
        for layer in alike:
            for rest, like in expected.items():
                tensor = layers[layer].get(rest)
                if tensor is None:
                    raise incomplete(
                        f"{files.folder.path}: {_name_in_layer(like, rest, layer, family)}",
                        f"is missing, and {like.name} is there",
                    )
                if tensor.shape != like.shape:
                    raise CheckpointError(
                        f"{files.location(tensor)}: has shape {list(tensor.shape)}, and "
                        f"{like.name} has {list(like.shape)}; one of them is another model's"
                    )


def tensors_by_layer(
    files: WeightFiles, config: ModelConfig, family: MoEFamily
) -> tuple[Mapping[int, Mapping[str, StoredTensor]], set[int]]:
    """The tensors of each layer by their names in it, without experts; the layers with experts.

    Scales are left out, because some layers may be quantized and others not. So are layers beyond
    the last one, which predict further tokens and are built in their own way.
    """
    layers: dict[int, dict[str, StoredTensor]] = defaultdict(dict)
    with_experts: set[int] = set()
    for name, tensor in files.tensors.items():
        place = family.names.parse_layer_key(name)
        if place is None or place[0] >= config.num_hidden_layers:
            continue
        layer, rest = place
        if family.names.parse_expert_key(name) is not None:
            with_experts.add(layer)
        elif rest.rpartition(".")[2] not in (SCALE_SUFFIX, BLOCK_SCALE_SUFFIX):
            layers[layer][rest] = tensor
    return layers, with_experts


def _blocks(tensors: Mapping[str, StoredTensor]) -> frozenset[str]:
    """The parts of a layer that have modules in them: its attention, its MLP."""
    return frozenset(rest.partition(".")[0] for rest in tensors if rest.count(".") > 1)


def _check_blocks(files: WeightFiles, layers: Mapping[int, Mapping[str, StoredTensor]]) -> None:
    """Check that no layer is like another one but for a part that it lacks."""
    every = {_blocks(tensors): layer for layer, tensors in layers.items()}
    for blocks, layer in every.items():
        for others, other in every.items():
            if blocks < others:
                raise incomplete(
                    f"{files.folder.path}: layer {layer}",
                    f"has no {min(others - blocks)}, and layer {other} has",
                )


def _name_in_layer(like: StoredTensor, rest: str, layer: int, family: MoEFamily) -> str:
    """The name that a tensor of a layer would have, from that of another layer's."""
    place = family.names.parse_layer_key(like.name)
    assert place is not None
    return like.name.removesuffix(f"{place[0]}.{rest}") + f"{layer}.{rest}"
