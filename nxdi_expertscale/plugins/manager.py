"""The plugins that are in force: those installed, narrowed by ``NXDI_PLUGINS``."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.plugins import hookspecs

if TYPE_CHECKING:
    from nxdi_expertscale.hooking.patch import Patch

ENTRY_POINT_GROUP = "nxdi.plugins"
OWN_PLUGIN = "expertscale"
ALLOW_LIST_VARIABLE = "NXDI_PLUGINS"

_Contribution = TypeVar("_Contribution")


def allowed_names() -> tuple[str, ...] | None:
    """The names in ``NXDI_PLUGINS``, or None where it is unset and every plugin is allowed.

    An empty value allows none: the switch to turn everything off.
    """
    value = os.environ.get(ALLOW_LIST_VARIABLE)
    if value is None:
        return None
    return tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))


class PluginManager:
    """The plugins of the group ``nxdi.plugins`` that are allowed, each loaded once.

    Attributes:
        problems: One line for each plugin that is named and not installed, or that failed to
            load. A broken plugin never stops the others.
    """

    def __init__(self, allowed: Iterable[str] | None) -> None:
        """Load the plugins.

        Args:
            allowed: Names to load and no others, or None for every installed one.
        """
        self._pluggy = pluggy.PluginManager(hookspecs.PROJECT)
        self._pluggy.add_hookspecs(hookspecs)
        self.problems: list[str] = []
        available = _installed()
        names = sorted({*available, OWN_PLUGIN}) if allowed is None else list(allowed)
        for name in names:
            self._load(name, available)

    def _load(self, name: str, available: dict[str, importlib.metadata.EntryPoint]) -> None:
        try:
            if name == OWN_PLUGIN:
                # Ours is always there, also from a source tree without installed metadata.
                from nxdi_expertscale import patches

                plugin: object = patches
            elif name in available:
                plugin = available[name].load()
            else:
                known = ", ".join(sorted({*available, OWN_PLUGIN}))
                self._report(f"no plugin is named {name!r} (installed: {known})")
                return
            self._pluggy.register(plugin, name=name)
            self._pluggy.check_pending()
        except (Exception, SystemExit) as error:
            self._report(f"plugin {name!r} failed to load: {_one_line(error)}")
            if self._pluggy.has_plugin(name):
                self._pluggy.unregister(name=name)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the plugins that are loaded."""
        return tuple(name for name, _ in self._pluggy.list_name_plugin())

    def families(self) -> tuple[MoEFamily, ...]:
        """Every family that the plugins contribute; a model type is claimed by one only."""
        found: dict[str, MoEFamily] = {}
        for plugin, family in self._contributions("nxdi_moe_families", MoEFamily):
            taken = {kind for other in found.values() for kind in other.model_types}
            doubles = sorted(taken.intersection(family.model_types))
            if family.name in found or doubles:
                self._report(
                    f"plugin {plugin!r}: its family {family.name!r} is left out, another one has "
                    f"its name or claims {', '.join(doubles) or 'it'}"
                )
                continue
            found[family.name] = family
        return tuple(found.values())

    def patches(self) -> tuple[Patch, ...]:
        """Every patch that the plugins contribute; a seam is patched by one only."""
        from nxdi_expertscale.hooking.patch import Patch

        found: dict[str, Patch] = {}
        for plugin, patch in self._contributions("nxdi_patches", Patch, families=self.families()):
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
                self._report(f"plugin {name!r} failed: {_one_line(error)}")
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


def load_plugins() -> PluginManager:
    """Load the plugins that ``NXDI_PLUGINS`` allows."""
    return PluginManager(allowed_names())


def print_problems(problems: Iterable[str]) -> None:
    """Say what is wrong with the plugins, one line on stderr each: the program goes on."""
    # There is no stderr in a process that was started with it closed.
    if sys.stderr is not None:
        for problem in problems:
            print(f"nxdi-expertscale: {problem}", file=sys.stderr)  # noqa: T201


def known_families() -> Sequence[MoEFamily]:
    """The families of the plugins that ``NXDI_PLUGINS`` allows, for reading checkpoints."""
    return load_plugins().families()


def _installed() -> dict[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in points}


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
