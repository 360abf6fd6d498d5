"""Finds, among many names, those that matter to one decoder layer.

A name is a part of a path with a layer's number in it either wherever the number stands, as
``self_attn`` is, or because of the number, as ``layers.3.mlp`` is. The second kind is looked up
by its digits, so that deciding on every layer takes time in proportion to names and layers, and
not to their product.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

_DIGITS = re.compile("[0-9]+")


class Side(Enum):
    """Which part of a layer's number the digits of a name are."""

    WHOLE = "whole"
    START = "start"
    END = "end"
    WITHIN = "within"

    @classmethod
    def of(cls, before: str, after: str) -> Side:
        """The side of digits that stand between two texts, which may be empty."""
        if before:
            return cls.WHOLE if after else cls.START
        return cls.END if after else cls.WITHIN

    def parts(self, number: str) -> Iterator[str]:
        """The digits that a name may have there for it to be a part of a path."""
        lengths = range(1, len(number) + 1)
        if self is Side.WHOLE:
            yield number
        elif self is Side.START:
            yield from (number[:length] for length in lengths)
        elif self is Side.END:
            yield from (number[-length:] for length in lengths)
        else:
            for length in lengths:
                starts = range(len(number) - length + 1)
                yield from (number[start : start + length] for start in starts)


@dataclass(frozen=True)
class LayerPath:
    """A path of every layer, as the text before the layer's number and the text after it.

    The text before ends, and the text after starts, with something else than a digit.
    """

    before: str
    after: str

    @classmethod
    def parse(cls, path: str) -> LayerPath:
        """Split a path at ``{layer}``; one without it is the same in every layer."""
        before, _, after = path.partition("{layer}")
        return cls(before, after)

    def holds_everywhere(self, name: str) -> bool:
        """Whether a name is a part of this path whatever the number is."""
        return name in self.before or name in self.after

    def holds_around(self, before: str, after: str) -> bool:
        """Whether two texts with some of the number's digits between them are a part of it."""
        return self.before.endswith(before) and self.after.startswith(after)


@dataclass(frozen=True, slots=True)
class NameInLayer:
    """A name that matters to a layer.

    Attributes:
        position: Its place among the names that were given.
        name: The name.
        paths: The set of the layer's paths that it is a part of: bit ``i`` for the path ``i``.
        by_itself: Whether it matters though it may be a part of none.
    """

    position: int
    name: str
    paths: int
    by_itself: bool


_Group = dict[tuple[int, bool], NameInLayer]
"""Names by what is decided by them: the paths, and whether they matter by themselves."""


class LayerNames:
    """Names, of which those that matter to a layer are looked up.

    Of names that are parts of the very same paths the first alone is kept.

    Attributes:
        everywhere: The names that matter to every layer.
    """

    def __init__(
        self,
        names: Iterable[str],
        paths: Iterable[str],
        matters_by_itself: Callable[[str], bool],
    ) -> None:
        """Sort names by the layers to which they matter.

        Args:
            names: The names.
            paths: Paths of every layer, with ``{layer}`` where its number stands.
            matters_by_itself: Whether a name matters though it is not a part of any path.
        """
        self._paths = tuple(map(LayerPath.parse, paths))
        self._matters_by_itself = matters_by_itself
        self._around: dict[tuple[str, str], int | None] = {}
        self._by_digits: dict[Side, dict[str, _Group]] = {}
        everywhere: _Group = {}
        for position, name in enumerate(dict.fromkeys(names)):
            self._add(position, name, everywhere)
        self.everywhere = tuple(everywhere.values())

    def of_layer(self, layer: int) -> tuple[NameInLayer, ...]:
        """The names that matter to a layer, in the order they came in.

        Returns:
            :attr:`everywhere` itself, where no name matters because of the layer's number.
        """
        number = str(layer)
        bound = [
            name
            for side, by_digits in self._by_digits.items()
            for digits in side.parts(number)
            if digits in by_digits
            for name in by_digits[digits].values()
        ]
        if not bound:
            return self.everywhere
        found = {name.position: name for name in self.everywhere}
        for name in bound:
            known = found.get(name.position, name)
            found[name.position] = replace(name, paths=name.paths | known.paths)
        return tuple(found[position] for position in sorted(found))

    def _add(self, position: int, name: str, everywhere: _Group) -> None:
        by_itself = self._matters_by_itself(name)
        fixed = _bits(path.holds_everywhere(name) for path in self._paths)
        is_bound = False
        for before, digits, after in digit_runs(name):
            by_number = self._match_around(before, after)
            if by_number is None or not (by_number or by_itself):
                continue
            is_bound = True
            groups = self._by_digits.setdefault(Side.of(before, after), {})
            found = NameInLayer(position, name, fixed | by_number, by_itself)
            groups.setdefault(digits, {}).setdefault((found.paths, by_itself), found)
        if fixed or (by_itself and not is_bound):
            found = NameInLayer(position, name, fixed, by_itself)
            everywhere.setdefault((fixed, by_itself), found)

    def _match_around(self, before: str, after: str) -> int | None:
        """The set of the paths that have two texts around digits of the number.

        None where no path has the text before its number.
        """
        key = (before, after)
        if key not in self._around:
            is_known = any(path.before.endswith(before) for path in self._paths)
            matches = _bits(path.holds_around(before, after) for path in self._paths)
            self._around[key] = matches if is_known else None
        return self._around[key]


def _bits(flags: Iterable[bool]) -> int:
    return sum(1 << position for position, flag in enumerate(flags) if flag)


def digit_runs(name: str) -> Iterator[tuple[str, str, str]]:
    """Each run of digits in a name, with the texts before and after it."""
    for run in _DIGITS.finditer(name):
        yield name[: run.start()], run[0], name[run.end() :]
