"""Which modules ``modules_to_not_convert`` leaves in full precision.

A name in it holds for a checkpoint and for NxDI's modules together, whichever of the two naming
it is from. It holds for every path that it is a part of, as in NxD
(``quantization/quantization_utils.py`` for checkpoints, ``quantization/quantize.py`` for modules).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import ClassVar

from nxdi_expertscale.errors import ConfigurationError, parameter
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.layer_names import LayerNames, NameInLayer
from nxdi_expertscale.families.linears import RenamedLinear
from nxdi_expertscale.families.tensor_names import LinearPlace

SETTING = "modules_to_not_convert"


@dataclass(frozen=True)
class PartOfFused:
    """Exclusions of less than what NxDI fuses in one dtype.

    Attributes:
        problem: What is wrong, with ``{names}`` of the fields.
        remedy: What to write instead.
    """

    problem: ClassVar[str]
    remedy: ClassVar[str]

    def to_error(self) -> ConfigurationError:
        """The error to raise for it."""
        problem = self.problem.replace(SETTING, parameter(SETTING))
        return ConfigurationError(f"{problem}; {self.remedy}".format_map(asdict(self)))


@dataclass(frozen=True)
class PartOfExperts(PartOfFused):
    """An exclusion of less than a layer's experts.

    Attributes:
        name: The exclusion, in quotes.
        experts: The path of all experts of the layer, in quotes.
    """

    problem = (
        f"{SETTING}: {{name}} names a part of what NxDI fuses, and it fuses a layer's experts in "
        "one dtype"
    )
    remedy = "name all experts of the layer: {experts}"

    name: str
    experts: str


@dataclass(frozen=True)
class PartOfAttention(PartOfFused):
    """Exclusions of some of a layer's queries, keys and values.

    Attributes:
        kept: Path of one that is excluded.
        paths: Paths of all.
    """

    problem = (
        f"{SETTING} keeps {{kept}} in full precision, and with fused_qkv=True NxDI fuses it with "
        "others in one dtype"
    )
    remedy = "name all of {paths}, or set fused_qkv=False"

    kept: str
    paths: str


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
        raise ConfigurationError(
            f"{parameter(SETTING)}: is one string; give a list of names, [{value!r}]"
        )
    if not isinstance(value, Collection) or not all(isinstance(name, str) for name in value):
        raise ConfigurationError(f"{parameter(SETTING)}: must be a list of names, not {value!r}")
    names = tuple(str(name) for name in value)
    if not all(map(is_name, names)):
        raise ConfigurationError(
            f"{parameter(SETTING)}: an empty name would exclude every module; remove it"
        )
    return names


def is_name(name: object) -> bool:
    """Whether an exclusion is a text that is not a part of every path."""
    return isinstance(name, str) and name.removeprefix("model.").strip() != ""


def is_excluded(path: str, exclusions: Iterable[str], family: MoEFamily) -> bool:
    """Whether ``modules_to_not_convert`` leaves a module as it is.

    See :meth:`Exclusions.leave_out`, which is quicker where many modules are asked for.
    """
    return _exclusions(tuple(exclusions), family).leave_out(path)


def are_experts_excluded(layer: int, exclusions: Iterable[str], family: MoEFamily) -> bool:
    """Whether ``modules_to_not_convert`` keeps a layer's experts in full precision.

    See :meth:`Exclusions.leave_out_experts`, which is quicker where many layers are asked for.
    """
    return _exclusions(tuple(exclusions), family).leave_out_experts(layer)


@lru_cache(maxsize=16)
def _exclusions(names: tuple[str, ...], family: MoEFamily) -> Exclusions:
    return Exclusions(names, family)


@dataclass(frozen=True)
class _Decision:
    """What is decided of a layer.

    Attributes:
        experts: Whether its experts are excluded.
        part: Which of the layer's names is of less than all of its experts; None if none is.
        linears: Its renamed linear layers that are excluded.
    """

    experts: bool
    part: int | None
    linears: tuple[RenamedLinear, ...]


class Exclusions:
    """The names in ``modules_to_not_convert``, for any number of names and layers.

    Attributes:
        names: Names of checkpoint tensors or of NxDI's modules, without ``model.``.
        family: The model's family.
    """

    def __init__(self, names: Iterable[str], family: MoEFamily) -> None:
        self.family = family
        # As they were written, for messages; of two that are the same the first.
        self._written: dict[str, str] = {}
        for name in names:
            self._written.setdefault(name.removeprefix("model."), name)
        self.names = tuple(filter(None, self._written))
        self._by_length: dict[int, set[str]] = {}
        for name in self.names:
            self._by_length.setdefault(len(name), set()).add(name)
        last = family.experts.rpartition(".")[2]
        one_expert = re.compile(rf"(?:^|\.){re.escape(last)}\.[0-9]")
        self._paths = _ComparedPaths(family)
        self._by_layer = LayerNames(
            self.names, self._paths.paths, lambda name: one_expert.search(name) is not None
        )
        self._decisions: dict[tuple[tuple[int, bool], ...], _Decision] = {}

    def leave_out(self, path: str) -> bool:
        """Whether a module stays as it is.

        What NxDI fuses is decided as a whole: a layer's experts, and with ``fused_qkv`` its
        queries, keys and values.

        Args:
            path: The module's path in a checkpoint, with or without ``model.``, such as
                ``model.layers.0.self_attn.q_proj``, or among NxDI's modules.

        Raises:
            ConfigurationError: A name is that of a part of what NxDI fuses, as one expert is.
        """
        expert = self.family.names.parse_expert_key(f"{path}.weight")
        if expert is not None:
            return self.leave_out_experts(expert.layer)
        layer = self.family.names.layer_of_module(path)
        if layer is not None:
            return self.leave_out_experts(layer)
        place = self.family.names.parse_linear_path(path)
        if place is None:
            return self._hold(path)
        return _raise_if_part(self.decide_linears(place))

    def leave_out_experts(self, layer: int) -> bool:
        """Whether a layer's experts stay as they are.

        NxDI fuses a layer's experts in one dtype, so it keeps all of them or none. A name may be
        the checkpoint's (``layers.0.mlp.experts``) or that of NxDI's module
        (``layers.0.mlp.expert_mlps``), or a part of either.

        Raises:
            ConfigurationError: A name is that of a part of what NxDI fuses, as ``down_proj`` is.
        """
        return _raise_if_part(self.decide_experts(layer))

    def decide_experts(self, layer: int) -> bool | PartOfFused:
        """Whether a layer's experts stay as they are, or what names less than all of them."""
        names = self._by_layer.of_layer(layer)
        decision = self._decide(names)
        if decision.part is None:
            return decision.experts
        name = self._written[names[decision.part].name]
        return PartOfExperts(repr(name), repr(self.family.experts.format(layer=layer)))

    def decide_linears(self, place: LinearPlace) -> bool | PartOfFused:
        """Whether linear layers stay as they are, or which of those that NxDI fuses do not."""
        found = self._decide(self._by_layer.of_layer(place.layer)).linears
        excluded = [one for one in place.linears if one in found]
        if not excluded or len(excluded) == len(place.linears):
            return bool(excluded)
        paths = ", ".join(one.checkpoint_path(place.layer) for one in place.linears)
        return PartOfAttention(excluded[0].checkpoint_path(place.layer), paths)

    def expand(self, num_layers: int) -> tuple[str, ...]:
        """Name what is excluded in both ways; see :func:`expand_exclusions`."""
        names = list(self.names)
        for layer in range(num_layers):
            names += self._expand_layer(layer)
        return tuple(dict.fromkeys(names))

    def _expand_layer(self, layer: int) -> list[str]:
        names = self._by_layer.of_layer(layer)
        added: list[str] = []
        if self.leave_out_experts(layer):
            experts, modules = self.family.experts, self.family.expert_mlps
            added += (experts.format(layer=layer), modules.format(layer=layer))
        for linear in self._decide(names).linears:
            both = (linear.checkpoint, linear.modules[0])
            unnamed = [path for path in both if not self._paths.is_named(path, names)]
            paths = [path.format(layer=layer) for path in unnamed]
            added += [path for path in paths if not any(name in path for name in added)]
        return added

    def _hold(self, path: str) -> bool:
        """Whether any name is a part of a path."""
        return any(
            path[start : start + length] in names
            for length, names in self._by_length.items()
            for start in range(len(path) - length + 1)
        )

    def _decide(self, names: tuple[NameInLayer, ...]) -> _Decision:
        # Many layers have names that are parts of the same paths.
        key = tuple((name.paths, name.by_itself) for name in names)
        if key not in self._decisions:
            self._decisions[key] = self._paths.decide(names)
        return self._decisions[key]


class _ComparedPaths:
    """The paths of a layer that names are compared with, and what follows from it.

    Attributes:
        paths: The paths, with ``{layer}`` for the layer's number.
    """

    def __init__(self, family: MoEFamily) -> None:
        modules = f"{family.expert_mlps}.mlp_op."
        whole = (f"{family.experts}.", modules)
        sides = (
            tuple(f".{part}" for part in family.projections),
            tuple(f"{modules}{part}" for part in family.fused),
        )
        linears = family.renamed_linears
        checkpoint = tuple(linear.checkpoint for linear in linears)
        modules_of_linears = (path for linear in linears for path in linear.all_modules)
        self.paths = tuple(
            dict.fromkeys((*whole, *sides[0], *sides[1], *checkpoint, *modules_of_linears))
        )
        self._whole = self._set_of(whole)
        self._sides = tuple(tuple(self._set_of([part]) for part in side) for side in sides)
        self._checkpoint = self._set_of(checkpoint)
        self._linears = [
            (linear, self._set_of([linear.checkpoint]), self._set_of(linear.all_modules))
            for linear in linears
        ]

    def _set_of(self, paths: Iterable[str]) -> int:
        return sum(1 << self.paths.index(path) for path in set(paths))

    def is_named(self, path: str, names: Iterable[NameInLayer]) -> bool:
        """Whether any name is a part of a path."""
        bit = self._set_of([path])
        return any(name.paths & bit for name in names)

    def decide(self, names: Sequence[NameInLayer]) -> _Decision:
        """Decide what the names that matter to a layer exclude of it."""
        experts, part = self._decide_experts(names)
        linears = tuple(
            linear
            for linear, checkpoint, modules in self._linears
            # "v_proj" is a part of the module's name "qkv_proj" as well: a name that is the
            # checkpoint's is read as that.
            if any(
                name.paths & checkpoint
                or (name.paths & modules and not name.paths & self._checkpoint)
                for name in names
            )
        )
        return _Decision(experts, part, linears)

    def _decide_experts(self, names: Sequence[NameInLayer]) -> tuple[bool, int | None]:
        if any(name.paths & self._whole for name in names):
            return True, None
        found = [
            [[at for at, name in enumerate(names) if name.paths & part] for part in side]
            for side in self._sides
        ]
        if any(all(side) for side in found):
            return True, None
        parts = [at for side in found for of_part in side for at in of_part]
        parts += [at for at, name in enumerate(names) if name.by_itself]
        return False, parts[0] if parts else None


def _raise_if_part(found: bool | PartOfFused) -> bool:
    if isinstance(found, PartOfFused):
        raise found.to_error()
    return found


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
    return Exclusions(exclusions, family).expand(num_layers)


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
    names = Exclusions(exclusions, family)
    return tuple(
        path.rpartition(".")[0].rpartition(".")[0]
        for path in _fused_paths(num_layers, family)
        if names.leave_out(path)
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
    names = Exclusions(exclusions, family)

    def decisions() -> Iterator[bool | PartOfFused]:
        yield from map(names.decide_experts, range(num_layers))
        for path in _fused_paths(num_layers, family) if fused_qkv else ():
            place = family.names.parse_linear_path(path)
            if place is not None:
                yield names.decide_linears(place)

    return next((found for found in decisions() if isinstance(found, PartOfFused)), None)


def _fused_paths(num_layers: int, family: MoEFamily) -> Iterator[str]:
    """Of each layer, one path at which NxDI holds linear layers fused."""
    fused = next((one.fused[0] for one in family.renamed_linears if one.fused), None)
    if fused is not None:
        yield from (fused.format(layer=layer) for layer in range(num_layers))
