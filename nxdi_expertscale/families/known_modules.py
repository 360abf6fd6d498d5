"""Checks that the names in ``modules_to_not_convert`` are of modules that a model has."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator

from nxdi_expertscale.errors import ConfigurationError, parameter
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.exclusions import SETTING
from nxdi_expertscale.families.layer_names import LayerPath, Side, digit_runs

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")


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
    known = _KnownPaths(paths, num_layers, family)
    for name in exclusions:
        bare = name.removeprefix("model.")
        if not known.have_part(bare) and name not in family.full_precision:
            near = difflib.get_close_matches(bare, known.parts_like(bare), n=3)
            raise ConfigurationError(
                f"{parameter(SETTING)}: {name!r} is no part of any module's name; "
                + (f"did you mean {' or '.join(map(repr, near))}?" if near else "remove it")
            )


class _KnownPaths:
    """The paths of a model's modules, those of all layers together.

    The paths of a checkpoint are grouped by what stands before and after the layer's number, so a
    name is compared with some dozens of paths, however many layers there are.
    """

    def __init__(self, paths: Iterable[str], num_layers: int, family: MoEFamily) -> None:
        numbers: dict[LayerPath, list[str]] = {}
        for path in _experts_together(paths, family):
            found = _NUMBER.search(path)
            if found is None:
                numbers[LayerPath(path, "")] = []
            else:
                layer_path = LayerPath(path[: found.start()], path[found.end() :])
                numbers.setdefault(layer_path, []).append(found[0])
        self._numbers = {path: _Numbers(found) for path, found in numbers.items()}
        layers, no_layers = _Numbers(map(str, range(num_layers))), _Numbers(())
        for path in _declared_paths(family):
            self._numbers[LayerPath.parse(path)] = layers if "{layer}" in path else no_layers

    def have_part(self, name: str) -> bool:
        """Whether a name is a part of any path."""
        runs = tuple(digit_runs(name))
        return name != "" and any(
            path.holds_everywhere(name)
            or any(
                path.holds_around(before, after) and numbers.have(Side.of(before, after), digits)
                for before, digits, after in runs
            )
            for path, numbers in self._numbers.items()
        )

    def parts_like(self, name: str) -> list[str]:
        """Parts of paths with as many words as a name has, and with its numbers where they fit."""
        words = name.count(".") + 1
        wanted = [digits for _, digits, _ in digit_runs(name)]
        candidates: dict[str, None] = {}
        for path, numbers in self._numbers.items():
            for number in numbers.choose(wanted):
                parts = f"{path.before}{number}{path.after}".split(".")
                starts = range(len(parts) - words + 1)
                candidates.update(
                    (".".join(parts[start : start + words]), None)
                    for start in starts
                    if not parts[start].isdecimal()
                )
        return list(candidates)


class _Numbers:
    """The numbers of the layers that have a path."""

    def __init__(self, numbers: Iterable[str]) -> None:
        self._numbers = dict.fromkeys(numbers)
        self._parts: dict[Side, set[str]] = {}

    def have(self, side: Side, digits: str) -> bool:
        """Whether digits are that part of any of the numbers."""
        if side not in self._parts:
            self._parts[side] = {part for number in self._numbers for part in side.parts(number)}
        return digits in self._parts[side]

    def choose(self, wanted: Iterable[str]) -> list[str]:
        """Those of the wanted numbers that there are, otherwise the first; one empty if none."""
        chosen = [number for number in wanted if number in self._numbers]
        return chosen or [next(iter(self._numbers), "")]


def _declared_paths(family: MoEFamily) -> Iterator[str]:
    """Paths that a model of a family has, with ``{layer}`` for the layer's number."""
    yield from (family.embeddings, family.head)
    modules = family.expert_mlps
    yield f"{modules.rpartition('.')[0]}.router.linear_router"
    yield from (f"{modules}.mlp_op.{fused}" for fused in family.fused)
    for linear in family.renamed_linears:
        yield from linear.all_modules


def _experts_together(paths: Iterable[str], family: MoEFamily) -> Iterable[str]:
    """Paths of modules without ``model.``, and one for all experts of a layer."""
    last = family.experts.rpartition(".")[2]
    are_experts: dict[str, bool] = {}
    found: dict[str, None] = {}
    for path in paths:
        block, separator, rest = path.removeprefix("model.").partition(f".{last}.")
        if not rest[:1].isdecimal():
            found[f"{block}{separator}{rest}"] = None
            continue
        experts = f"{block}.{last}"
        if experts not in are_experts:
            key = f"{experts}.0.{family.gate}.weight"
            are_experts[experts] = family.names.parse_expert_key(key) is not None
        found[experts if are_experts[experts] else f"{experts}.{rest}"] = None
    return found
