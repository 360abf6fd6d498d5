"""Loads the plugins that are installed, narrowed by ``NXDI_PLUGINS``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import pluggy

from nxdi_expertscale.errors import one_line
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.plugins import hookspecs

ENTRY_POINT_GROUP = "nxdi.plugins"
OWN_PLUGIN = "expertscale"
ALLOW_LIST_VARIABLE = "NXDI_PLUGINS"

_OWN_PLUGIN_MODULE = "nxdi_expertscale.patches"
"""Named by a string: the patches stand on the plugins, and not the other way about."""

_Contribution = TypeVar("_Contribution")


def allowed_names() -> tuple[str, ...] | None:
    """The names in ``NXDI_PLUGINS``, or None where it is unset and every plugin is allowed.

    An empty value allows none: the switch to turn everything off.
    """
    value = os.environ.get(ALLOW_LIST_VARIABLE)
    if value is None:
        return None
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


@dataclass(frozen=True)
class Plugins:
    """Plugins that were loaded, and what they contribute.

    Attributes:
        allowed: The names that were allowed, or None where every installed plugin was.
        names: Names of the plugins that are loaded.
        families: Their families; a model type is claimed by one only.
        patches: Their patches; a seam has one only.
        problems: One line for each plugin that is named and not installed, or that failed, and
            for each contribution that is left out. A broken plugin never stops the others.
    """

    allowed: tuple[str, ...] | None
    names: tuple[str, ...]
    families: tuple[MoEFamily, ...]
    patches: tuple[Patch, ...]
    problems: tuple[str, ...]


def load_plugins(allowed: tuple[str, ...] | None) -> Plugins:
    """Load plugins of the entry point group ``nxdi.plugins``, and ask them what they contribute.

    Args:
        allowed: Names to load and no others, or None for every installed one.
    """
    loader = _Loader()
    loader.load(allowed)
    families = loader.families()
    patches = loader.patches(families)
    return Plugins(allowed, loader.names, families, patches, tuple(loader.problems))


class _Loader:
    """A pluggy manager that reports what is wrong with a plugin, and goes on with the others."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._pluggy.list_name_plugin())

    def load(self, allowed: tuple[str, ...] | None) -> None:
        available = _installed()
        names = sorted({*available, OWN_PLUGIN}) if allowed is None else allowed
        for name in names:
            if name == OWN_PLUGIN or name in available:
                self._load(name, available)
            else:
                known = ", ".join(sorted({*available, OWN_PLUGIN}))
                self._report(f"no plugin is named {name!r} (installed: {known})")

    def _load(self, name: str, available: dict[str, importlib.metadata.EntryPoint]) -> None:
        try:
            # Ours is always there, also from a source tree without installed metadata.
            plugin: object = (
                importlib.import_module(_OWN_PLUGIN_MODULE)
                if name == OWN_PLUGIN
                else available[name].load()
            )
            self._pluggy.register(plugin, name=name)
            self._pluggy.check_pending()
        except (Exception, SystemExit) as error:
            self._report(f"plugin {name!r} failed to load: {one_line(error)}")
            if self._pluggy.has_plugin(name):
                self._pluggy.unregister(name=name)

    def families(self) -> tuple[MoEFamily, ...]:
        found: dict[str, MoEFamily] = {}
        for plugin, family in self._contributions("nxdi_moe_families", MoEFamily):
            taken = {model_type for other in found.values() for model_type in other.model_types}
            clashes = sorted(taken.intersection(family.model_types))
            if family.name in found or clashes:
                self._report(
                    f"plugin {plugin!r}: its family {family.name!r} is left out, another one has "
                    f"its name or claims {', '.join(clashes) or 'it'}"
                )
                continue
            found[family.name] = family
        return tuple(found.values())

    def patches(self, families: tuple[MoEFamily, ...]) -> tuple[Patch, ...]:
        found: dict[str, Patch] = {}
        for plugin, patch in self._contributions("nxdi_patches", Patch, families=families):
            if patch.seam in found:
                self._report(
                    f"plugin {plugin!r}: its patch {patch.seam!r} is left out, another one has "
                    "its name"
                )
                continue
            found[patch.seam] = patch
        return tuple(found.values())

    def _contributions(
        self, hook: str, kind: type[_Contribution], **arguments: Any
    ) -> list[tuple[str, _Contribution]]:
        """What each plugin gives at a hook, with the plugin's name. One that fails is reported.

        Ours comes first: what is built in is not taken over by who comes first in the alphabet.
        """
        found: list[tuple[str, _Contribution]] = []
        plugins = sorted(self._pluggy.list_name_plugin(), key=lambda named: named[0] != OWN_PLUGIN)
        for name, plugin in plugins:
            others = [other for _, other in plugins if other is not plugin]
            call = self._pluggy.subset_hook_caller(hook, remove_plugins=others)
            try:
                given = [item for part in call(**arguments) for item in part]
            except (Exception, SystemExit) as error:
                self._report(f"plugin {name!r} failed: {one_line(error)}")
                continue
            for item in given:
                if isinstance(item, kind):
                    found.append((name, item))
                else:
                    self._report(
                        f"plugin {name!r}: {hook} gives a {type(item).__name__}, "
                        f"not a {kind.__name__}"
                    )
        return found

    def _report(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)


def _installed() -> dict[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in points}
