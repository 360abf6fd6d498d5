"""Stand-ins for Neuron's closed packages, so that the open sources of NxDI and NxD import on a CPU.

What NxDI and NxD import of the compiler, the device and its kernels is not needed to build a
model, load it and run it on a CPU; it only has to be importable. Any submodule and any attribute
under :data:`CLOSED_PACKAGES` resolves to a mock, but for the few that are called or written into
a config on the way. Nothing of an open package is replaced.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import MagicMock

CLOSED_PACKAGES = ("torch_xla", "torch_neuronx", "neuronxcc", "libneuronxla", "nki", "nkilib")
"""Roots of the packages that have no public source."""

OPTIONAL_PACKAGES = ("torchvision",)
"""Open packages that are stood in for only where they are not installed."""

PLATFORM = "trn2"

VERSION = "2.0"
"""Of every closed package; NxD 0.14 builds models with no other torch_neuronx than 2."""


class _Enumeration:
    """An enumeration whose members, and what it makes of values, are plain strings.

    Configs hold some of them, and a config has to serialise to JSON.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, member: str) -> str:
        if member.startswith("__"):
            raise AttributeError(member)
        return member

    def __call__(self, *values: object) -> str:
        return f"{self._name}({', '.join(map(str, values))})"


def _return_arguments(_function: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a function that would build HLO by one that hands on what it was given."""

    def hand_on(*arguments: Any) -> Any:
        return arguments[0] if len(arguments) == 1 else arguments

    return hand_on


_KNOWN: dict[str, Any] = {
    "get_platform_target": lambda *_, **__: PLATFORM,
    "xla_hlo_call": _return_arguments,
    **{
        name: _Enumeration(name)
        for name in ("ActFnType", "BlockShardStrategy", "ExpertAffinityScaleMode", "SkipMode")
    },
}
"""What a mock would not do for, by the name it is imported under."""


class _StandInModule(types.ModuleType):
    """A package in which every name exists."""

    __path__: Sequence[str] = ()
    __version__ = VERSION

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _KNOWN.get(name)
        if value is None:
            value = MagicMock(name=f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module under some roots."""

    def __init__(self, roots: Sequence[str]) -> None:
        self._roots = frozenset(roots)

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self._roots:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _NeuronClasses:
    """``torch.classes.neuron``, of which NxD names classes in annotations."""

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})


def install() -> None:
    """Make the closed packages importable; to be called before NxD or NxDI is imported.

    A second call in a process changes nothing.
    """
    import torch

    if any(isinstance(finder, _StandInFinder) for finder in sys.meta_path):
        return

    missing = [name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name) is None]
    sys.meta_path.insert(0, _StandInFinder([*CLOSED_PACKAGES, *missing]))
    torch.classes.neuron = _NeuronClasses()
