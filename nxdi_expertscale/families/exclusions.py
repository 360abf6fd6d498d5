"""Which modules ``modules_to_not_convert`` leaves in full precision.

A name in it holds for a checkpoint and for NxDI's modules together, whichever of the two naming
it is from. It holds for every path that it is a part of, as in NxD
(``quantization/quantization_utils.py`` for checkpoints, ``quantization/quantize.py`` for modules).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.linears import RenamedLinear
from nxdi_expertscale.families.tensor_names import LinearPlace

SETTING = "modules_to_not_convert"


@dataclass(frozen=True)
class PartOfFused:
    """Exclusions of less than what NxDI fuses in one dtype.

    Attributes:
        problem: What they name.
        remedy: What to write instead.
    """

    problem: str
    remedy: str

    def to_error(self) -> ConfigurationError:
        """The error to raise for it."""
        return ConfigurationError(f"{SETTING}: {self.problem}; {self.remedy}")


def parse_exclusions(value: object) -> tuple[str, ...]:
    """Read a value of ``modules_to_not_convert``.

    Args:
        value: A list or tuple of names, or None.

    Raises:
        ConfigurationError: It is something else, such as one string, of which NxD would take each
            letter for a name, or has an empty name, which is a part of every path.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        raise ConfigurationError(f"{SETTING}: is one string; give a list of names, [{value!r}]")
    if not isinstance(value, Collection) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError(f"{SETTING}: must be a list of names, not {value!r}")
    names = tuple(str(name) for name in value)
    if not all(map(is_name, names)):
        raise ConfigurationError(f"{SETTING}: an empty name would exclude every module; remove it")
    return names


def is_name(name: object) -> bool:
    """Whether an exclusion is a text that is not a part of every path."""
    return isinstance(name, str) and name.removeprefix("model.").strip() != ""


def is_excluded(path: str, exclusions: Iterable[str], family: MoEFamily) -> bool:
    """Whether ``modules_to_not_convert`` leaves a module as it is.

    What NxDI fuses is decided as a whole: a layer's experts, and with ``fused_qkv`` its queries,
    keys and values.

    Args:
        path: The module's path in a checkpoint, with or without ``model.``, such as
            ``model.layers.0.self_attn.q_proj``, or among NxDI's modules.
        exclusions: Names of checkpoint tensors or of NxDI's modules, with or without ``model.``.
        family: The model's family.

    Raises:
        ConfigurationError: A name is that of a part of what NxDI fuses, as one expert is.
    """
    names = tuple(exclusions)
    expert = family.names.parse_expert_key(f"{path}.weight")
    if expert is not None:
        return are_experts_excluded(expert.layer, names, family)
    layer = family.names.layer_of_module(path)
    if layer is not None:
        return are_experts_excluded(layer, names, family)
    place = family.names.parse_linear_path(path)
    if place is None:
        return any(_is_part_of(name, path) for name in names)
    found = _decide_linears(place, names, family)
    if isinstance(found, PartOfFused):
        raise found.to_error()
    return found


def are_experts_excluded(layer: int, exclusions: Iterable[str], family: MoEFamily) -> bool:
    """Whether ``modules_to_not_convert`` keeps a layer's experts in full precision.

    NxDI fuses a layer's experts in one dtype, so it keeps all of them or none. A name may be
    the checkpoint's (``layers.0.mlp.experts``) or that of NxDI's module
    (``layers.0.mlp.expert_mlps``), or a part of either.

    Raises:
        ConfigurationError: A name is that of a part of what NxDI fuses, as ``down_proj`` is.
    """
    found = _decide_experts(layer, tuple(exclusions), family)
    if isinstance(found, PartOfFused):
        raise found.to_error()
    return found


@lru_cache(maxsize=4096)
def _decide_experts(layer: int, names: tuple[str, ...], family: MoEFamily) -> bool | PartOfFused:
    experts = f"{family.experts.format(layer=layer)}."
    modules = f"{family.expert_mlps.format(layer=layer)}.mlp_op."
    if any(_is_part_of(name, path) for name in names for path in (experts, modules)):
        return True
    sides = [
        [[n for n in names if _is_part_of(n, f".{part}")] for part in family.projections],
        [[n for n in names if _is_part_of(n, f"{modules}{part}")] for part in family.fused],
    ]
    if any(all(side) for side in sides):
        return True
    one_expert = re.compile(rf"(?:^|\.){re.escape(_last(family.experts))}\.[0-9]")
    parts = [name for side in sides for found in side for name in found]
    parts += [name for name in names if one_expert.search(name)]
    if not parts:
        return False
    return PartOfFused(
        f"{parts[0]!r} names a part of what NxDI fuses, and it fuses a layer's experts in one "
        "dtype",
        f"name all experts of the layer: {family.experts.format(layer=layer)!r}",
    )


def _decide_linears(
    place: LinearPlace, names: tuple[str, ...], family: MoEFamily
) -> bool | PartOfFused:
    layer = place.layer
    excluded = [one for one in place.linears if _is_linear_excluded(layer, one, names, family)]
    if not excluded or len(excluded) == len(place.linears):
        return bool(excluded)
    paths = [one.checkpoint_path(layer) for one in place.linears]
    return PartOfFused(
        f"keeps {excluded[0].checkpoint_path(layer)} in full precision, and with fused_qkv=True "
        "NxDI fuses it with others in one dtype",
        f"name all of {paths}, or set fused_qkv=False",
    )


@lru_cache(maxsize=4096)
def _is_linear_excluded(
    layer: int, linear: RenamedLinear, names: tuple[str, ...], family: MoEFamily
) -> bool:
    return any(_names_linear(name, layer, linear, family) for name in names)


def _names_linear(name: str, layer: int, linear: RenamedLinear, family: MoEFamily) -> bool:
    if _is_part_of(name, linear.checkpoint_path(layer)):
        return True
    # "v_proj" is a part of the module's name "qkv_proj" as well: a name that is the checkpoint's
    # is read as that.
    is_checkpoints = any(
        _is_part_of(name, other.checkpoint_path(layer)) for other in family.renamed_linears
    )
    return not is_checkpoints and any(
        _is_part_of(name, path) for path in linear.module_paths(layer)
    )


def expand_exclusions(
    exclusions: Collection[str], num_layers: int, family: MoEFamily
) -> tuple[str, ...]:
    """Name what is excluded both as checkpoints and as NxDI's modules are named.

    To the names, without ``model.``, are added those of each layer's experts that stay in
    full precision, ``layers.0.mlp.experts`` and ``layers.0.mlp.expert_mlps``, and those of other
    linear layers that none of the names is a part of.

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
        for linear in family.renamed_linears:
            if _is_linear_excluded(layer, linear, tuple(exclusions), family):
                both = (linear.checkpoint_path(layer), linear.module_paths(layer)[0])
                names += [path for path in both if not any(name in path for name in names)]
    return tuple(dict.fromkeys(names))


def attention_without_scales(
    exclusions: Collection[str], num_layers: int, family: MoEFamily
) -> tuple[str, ...]:
    """Paths of the attention whose fused queries, keys and values stay in full precision.

    NxDI's converters look for these very names in ``modules_to_not_convert`` to know where
    ``fused_qkv`` has no scales to fuse (``convert_state_dict_to_fused_qkv`` of
    ``models/qwen3_moe/modeling_qwen3_moe.py`` and others).

    Raises:
        ConfigurationError: Not all of a layer's queries, keys and values are excluded.
    """
    return tuple(
        path.rpartition(".")[0].rpartition(".")[0]
        for path in _fused_paths(num_layers, family)
        if is_excluded(path, exclusions, family)
    )


def find_part_of_fused(
    exclusions: Collection[str], num_layers: int, family: MoEFamily, *, fused_qkv: bool
) -> PartOfFused | None:
    """Find an exclusion of less than what NxDI fuses in one dtype.

    Args:
        exclusions: Names of checkpoint tensors or of NxDI's modules.
        num_layers: The model's number of layers.
        family: The model's family.
        fused_qkv: Whether NxDI fuses queries, keys and values.
    """
    names = tuple(exclusions)
    decisions = [_decide_experts(layer, names, family) for layer in range(num_layers)]
    if fused_qkv:
        places = (family.names.parse_linear_path(p) for p in _fused_paths(num_layers, family))
        decisions += [_decide_linears(place, names, family) for place in places if place]
    return next((found for found in decisions if isinstance(found, PartOfFused)), None)


def _fused_paths(num_layers: int, family: MoEFamily) -> Iterator[str]:
    """Of each layer, one path at which NxDI holds linear layers fused."""
    fused = next((one.fused[0] for one in family.renamed_linears if one.fused), None)
    if fused is not None:
        yield from (fused.format(layer=layer) for layer in range(num_layers))


def check_names(
    exclusions: Iterable[str], paths: Collection[str], num_layers: int, family: MoEFamily
) -> None:
    """Check that each exclusion is a part of the path of some module.

    Args:
        exclusions: Names of checkpoint tensors or of NxDI's modules.
        paths: Paths of the modules in the checkpoint, with or without ``model.``.
        num_layers: The model's number of layers.
        family: The model's family.

    Raises:
        ConfigurationError: One is not; the message lists names that are near to it.
    """
    for name in exclusions:
        is_known = name in family.full_precision or any(_is_part_of(name, path) for path in paths)
        if is_known or any(_is_part_of(name, p) for p in _declared_paths(num_layers, family)):
            continue
        near = _near_names(name.removeprefix("model."), paths, num_layers, family)
        raise ConfigurationError(
            f"{SETTING}: {name!r} is no part of any module's name; "
            + (f"did you mean {' or '.join(map(repr, near))}?" if near else "remove it")
        )


def _declared_paths(num_layers: int, family: MoEFamily) -> Iterator[str]:
    yield from (family.embeddings, family.head)
    for layer in range(num_layers):
        yield family.router_module(layer)
        for fused in family.fused:
            yield family.fused_key(layer, fused).removesuffix(".weight")
        for linear in family.renamed_linears:
            yield from linear.module_paths(layer)


def _experts_or_path(path: str, family: MoEFamily) -> str:
    expert = family.names.parse_expert_key(f"{path}.weight")
    return path if expert is None else family.experts.format(layer=expert.layer)


def _near_names(name: str, paths: Iterable[str], num_layers: int, family: MoEFamily) -> list[str]:
    """What might have been meant by a name: parts of paths with as many words as it has."""
    # Of a layer's experts one is enough.
    known = {_experts_or_path(path.removeprefix("model."), family) for path in paths}
    words = name.count(".") + 1
    candidates: dict[str, None] = {}
    for path in (*sorted(known), *_declared_paths(num_layers, family)):
        parts = path.split(".")
        starts = range(len(parts) - words + 1)
        candidates.update(
            (".".join(parts[start : start + words]), None)
            for start in starts
            if not parts[start].isdecimal()
        )
    return difflib.get_close_matches(name, candidates, n=3)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _is_part_of(name: str, path: str) -> bool:
    bare = name.removeprefix("model.")
    return bare != "" and (bare in path or name in path)
