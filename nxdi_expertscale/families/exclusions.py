"""Which modules ``modules_to_not_convert`` leaves in full precision."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.families.declaration import MoEFamily


def is_excluded(path: str, exclusions: Iterable[str], family: MoEFamily) -> bool:
    """Whether ``modules_to_not_convert`` leaves a module of a checkpoint as it is.

    A name holds for every module whose dotted path contains it, as in NxD
    (``quantization/quantization_utils.py`` for checkpoints, ``quantization/quantize.py`` for
    modules). An expert's module is decided with all of its layer's.

    Args:
        path: The module's path in a checkpoint, with or without ``model.``, such as
            ``model.layers.0.self_attn.q_proj``.
        exclusions: Names of checkpoint tensors or of NxDI's modules, with or without ``model.``.
        family: The model's family.

    Raises:
        ConfigurationError: A name is that of a part of what NxDI fuses, as one expert is.
    """
    names = tuple(exclusions)
    expert = family.names.parse_expert_key(f"{path}.weight")
    if expert is None:
        return any(_is_part_of(name, path) for name in names)
    if are_experts_excluded(expert.layer, names, family):
        return True
    for name in names:
        if _is_part_of(name, path):
            raise _part_of_fused(name, expert.layer, family)
    return False


def are_experts_excluded(layer: int, exclusions: Iterable[str], family: MoEFamily) -> bool:
    """Whether ``modules_to_not_convert`` keeps a layer's experts in full precision.

    NxDI fuses a layer's experts in one dtype, so it keeps all of them or none. A name may be
    the checkpoint's (``layers.0.mlp.experts``) or that of NxDI's module
    (``layers.0.mlp.expert_mlps``), or a part of either.

    Raises:
        ConfigurationError: A name is that of a part of what NxDI fuses, as ``down_proj`` is.
    """
    names = tuple(exclusions)
    experts = f"model.{family.experts.format(layer=layer)}."
    modules = f"{family.expert_mlps.format(layer=layer)}.mlp_op."
    if any(_is_part_of(name, path) for name in names for path in (experts, modules)):
        return True
    sides = (
        {part: [n for n in names if _is_part_of(n, f".{part}")] for part in family.projections},
        # A name such as "gate" is a router's in a checkpoint, and no more than a syllable here.
        {part: [n for n in names if n.rpartition(".")[2] == part] for part in family.fused},
    )
    for named in sides:
        if all(named.values()):
            return True
        for found in named.values():
            if found:
                raise _part_of_fused(found[0], layer, family)
    return False


def _part_of_fused(name: str, layer: int, family: MoEFamily) -> ConfigurationError:
    return ConfigurationError(
        f"modules_to_not_convert: {name!r} names a part of what NxDI fuses, and it fuses a "
        "layer's experts in one dtype; name all experts of the layer: "
        f"{family.experts.format(layer=layer)!r}"
    )


def expand_exclusions(
    exclusions: Collection[str], num_layers: int, family: MoEFamily
) -> tuple[str, ...]:
    """Name what is excluded both as checkpoints and as NxDI's modules are named.

    To the names, without ``model.``, are added those of each layer's experts that stay in
    full precision: ``layers.0.mlp.experts`` and ``layers.0.mlp.expert_mlps``.

    Args:
        exclusions: Names of checkpoint tensors or of NxDI's modules.
        num_layers: The model's number of layers.
        family: The model's family.

    Raises:
        ConfigurationError: A name is that of a part of what NxDI fuses.
    """
    names = [name.removeprefix("model.") for name in exclusions]
    for layer in range(num_layers):
        if are_experts_excluded(layer, exclusions, family):
            names.append(family.experts.format(layer=layer))
            names.append(family.expert_mlps.format(layer=layer))
    return tuple(dict.fromkeys(names))


def _is_part_of(name: str, path: str) -> bool:
    bare = name.removeprefix("model.")
    return name in path or (bare != "" and bare in path)
