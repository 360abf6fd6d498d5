"""The plugins that are in force: those installed, narrowed by ``NXDI_PLUGINS``."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pluggy

from nxdi_expertscale import hookspecs
from nxdi_expertscale.errors import PluginError
from nxdi_expertscale.families import MoEFamily

if TYPE_CHECKING:
    from nxdi_expertscale.activation import Patch

ENTRY_POINT_GROUP = "nxdi.plugins"
OWN_PLUGIN = "expertscale"
ALLOW_LIST_VARIABLE = "NXDI_PLUGINS"


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
                self.problems.append(f"no plugin is named {name!r} (installed: {known})")
                return
            self._pluggy.register(plugin, name=name)
        except Exception as error:  # noqa: BLE001 -- a plugin may fail in any way
            self.problems.append(f"plugin {name!r} failed to load: {_one_line(error)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the plugins that are loaded."""
        return tuple(name for name, _ in self._pluggy.list_name_plugin())

    def families(self) -> tuple[MoEFamily, ...]:
        """Every family that the plugins contribute.

        Raises:
            PluginError: Two families claim the same model type or the same name.
        """
        found = [family for part in self._pluggy.hook.nxdi_moe_families() for family in part]
        _refuse_doubles("model_type", [kind for family in found for kind in family.model_types])
        _refuse_doubles("family name", [family.name for family in found])
        return tuple(found)

    def patches(self) -> tuple[Patch, ...]:
        """Every patch that the plugins contribute."""
        parts = self._pluggy.hook.nxdi_patches(families=self.families())
        return tuple(patch for part in parts for patch in part)


def load_plugins() -> PluginManager:
    """Load the plugins that ``NXDI_PLUGINS`` allows, with one line on stderr for each problem."""
    manager = PluginManager(allowed_names())
    for problem in manager.problems:
        print(f"nxdi-expertscale: {problem}", file=sys.stderr)  # noqa: T201
    return manager


def known_families() -> Sequence[MoEFamily]:
    """The families of the plugins that ``NXDI_PLUGINS`` allows, for reading checkpoints."""
    return load_plugins().families()


def _installed() -> dict[str, importlib.metadata.EntryPoint]:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in points}


def _refuse_doubles(what: str, values: Sequence[str]) -> None:
    doubles = sorted({value for value in values if values.count(value) > 1})
    if doubles:
        raise PluginError(
            f"{what} {doubles[0]!r} is claimed by two plugins; name the plugins to use in "
            f"{ALLOW_LIST_VARIABLE}"
        )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
