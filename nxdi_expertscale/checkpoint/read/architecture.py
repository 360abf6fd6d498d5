"""Check that the tensors of a checkpoint are those of the model that its config describes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from nxdi_expertscale.checkpoint.read.config import ModelConfig
from nxdi_expertscale.checkpoint.read.files import CONFIG, WeightFiles
from nxdi_expertscale.checkpoint.read.tensors import module_of
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.errors import CheckpointError, incomplete
from nxdi_expertscale.families.declaration import MoEFamily

_LEADING_ZEROS = re.compile(r"(?<=\.)0+(?=[0-9]+\.)")


def check_architecture(files: WeightFiles, config: ModelConfig, family: MoEFamily) -> None:
    """Check that all experts are there and that shapes are those that the config says.

    Raises:
        CheckpointError: They are not; the message names the first tensor.
    """
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    found: dict[int, set[tuple[int, str]]] = defaultdict(set)
    biased: dict[int, set[tuple[int, str]]] = defaultdict(set)
    for name, tensor in files.tensors.items():
        place = family.names.parse_expert_key(name)
        if family.names.is_mtp_key(name, config.num_hidden_layers):
            continue
        if place is not None and place.suffix == "weight":
            found[place.layer].add((place.expert, place.projection))
            shape = (hidden, inner) if place.projection == family.down else (inner, hidden)
            check_shape(files, tensor, shape)
        elif place is not None and place.suffix == "bias":
            biased[place.layer].add((place.expert, place.projection))
    _check_expert_biases(files, config, family, biased)
    _check_names(files, config, family)
    vocabulary = (config.vocab_size, hidden)
    _check_tensor(files, family, f"{family.final_norm}.weight", (hidden,))
    _check_tensor(files, family, f"{family.embeddings}.weight", vocabulary)
    if not config.tie_word_embeddings:
        _check_tensor(files, family, f"{family.head}.weight", vocabulary)
    for layer in range(config.num_hidden_layers):
        if found[layer] or not _has_dense_mlp(files, family, layer):
            _check_experts(files, config, family, layer, found[layer])
            _check_tensor(files, family, family.router_key(layer), (config.num_experts, hidden))
    _check_router_biases(files, config, family)


def _check_expert_biases(
    files: WeightFiles,
    config: ModelConfig,
    family: MoEFamily,
    biased: Mapping[int, Collection[tuple[int, str]]],
) -> None:
    """Check that a bias that one expert of a layer has, all have."""
    for layer, found in biased.items():
        for projection in sorted({projection for _, projection in found}):
            for expert in range(config.num_experts):
                if (expert, projection) not in found:
                    bias = family.expert_key(layer, expert, projection, "bias")
                    raise incomplete(
                        f"{files.folder.path}: {bias}",
                        "is missing, and other experts of the layer have one",
                    )


def _check_router_biases(files: WeightFiles, config: ModelConfig, family: MoEFamily) -> None:
    """Check that what is added to the experts' scores is one number for each expert.

    Hugging Face has it in the router (``mlp.gate.e_score_correction_bias``), or beside it.
    """
    for name, tensor in files.tensors.items():
        place = family.names.parse_block_key(name)
        is_beside_router = place is not None and "." not in place[1]
        if name.endswith("bias") and (is_beside_router or family.names.is_router_key(name)):
            check_shape(files, tensor, (config.num_experts,))


def _check_names(files: WeightFiles, config: ModelConfig, family: MoEFamily) -> None:
    """Check that no tensor is there under two names: behind a prefix, or with zeros in a number."""
    prefixes = sorted(filter(None, family.prefixes), key=len, reverse=True)
    for name, tensor in files.tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        others = {name.removeprefix(prefix), _LEADING_ZEROS.sub("", name)} - {name}
        if not family.names.is_mtp_key(name, config.num_hidden_layers):
            others |= {rest for rest in _ends_of(name) if family.names.parse_layer_key(rest)}
        for other in sorted(others & files.tensors.keys()):
            if files.tensors[other].shape == tensor.shape or other == name.removeprefix(prefix):
                raise CheckpointError(
                    f"{files.location(tensor)}: is there as {other} as well; remove one of the two"
                )


def _ends_of(name: str) -> Iterator[str]:
    """What is left of a name without its first parts, up to the first number."""
    parts = name.split(".")
    for number, part in enumerate(parts[:-1], 1):
        if part.isdigit():
            return
        yield ".".join(parts[number:])


def _check_experts(
    files: WeightFiles,
    config: ModelConfig,
    family: MoEFamily,
    layer: int,
    found: set[tuple[int, str]],
) -> None:
    extra = [place for place in found if place[0] >= config.num_experts]
    if extra:
        raise CheckpointError(
            f"{files.folder.path}: {family.expert_key(layer, *min(extra))}: is there, and "
            f"{CONFIG} says {config.num_experts} experts; one of them is another model's"
        )
    count = config.num_experts * len(family.projections)
    if len(found) < count:
        missing = next(
            (expert, projection)
            for expert in range(config.num_experts)
            for projection in family.projections
            if (expert, projection) not in found
        )
        raise incomplete(
            f"{files.folder.path}: {family.expert_key(layer, *missing)}",
            f"is missing, one of {count - len(found)} of {count} in layer {layer}",
        )


def _has_dense_mlp(files: WeightFiles, family: MoEFamily, layer: int) -> bool:
    """Whether a layer has a dense MLP where others have experts."""
    block = module_of(module_of(family.router_key(layer)))
    return any(
        path in files.tensors
        for projection in family.projections
        for path in family.paths(f"{block}.{projection}.weight")
    )


def _check_tensor(files: WeightFiles, family: MoEFamily, name: str, shape: tuple[int, ...]) -> None:
    found = (files.tensors.get(path) for path in family.paths(name))
    tensor = next((tensor for tensor in found if tensor is not None), None)
    if tensor is None:
        raise incomplete(f"{files.folder.path}: {name}", "is missing")
    check_shape(files, tensor, shape)


def check_shape(files: WeightFiles, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Check that a tensor has the shape that the config says.

    Raises:
        CheckpointError: It has another one.
    """
    if tensor.shape != shape:
        raise CheckpointError(
            f"{files.location(tensor)}: has shape {list(tensor.shape)}, and {CONFIG} says "
            f"{list(shape)}; one of them is another model's"
        )
