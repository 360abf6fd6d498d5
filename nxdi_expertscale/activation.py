"""Applies the patches of the installed plugins, and removes them again.

The composition root: it hands the patches that :mod:`nxdi_expertscale.plugins` finds to
:mod:`nxdi_expertscale.hooking`, which knows no plugins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from nxdi_expertscale.display.results import Shown, Table
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.locks import fork_safe_lock
from nxdi_expertscale.hooking.patch import SeamStatus
from nxdi_expertscale.plugins.registry import registry

# Held for moments only, never while plugins are loaded or modules are imported.
_lock = fork_safe_lock()
_active_plugins: tuple[str, ...] = ()


def activate() -> None:
    """Activate the installed plugins that ``NXDI_PLUGINS`` allows, and apply their patches.

    Each patch is applied when the module that it names is imported, or at once if it already
    is. Activating twice is activating once. A problem with a plugin is printed to stderr once.
    """
    global _active_plugins  # noqa: PLW0603
    plugins = registry.reload()
    with _lock:
        _active_plugins = tuple(dict.fromkeys((*_active_plugins, *plugins.names)))
    engine.activate(plugins.patches)


def deactivate() -> None:
    """Remove every patch, and restore the very objects that upstream had there."""
    global _active_plugins  # noqa: PLW0603
    with _lock:
        engine.deactivate()
        registry.clear()
        _active_plugins = ()


class Seams(Shown, tuple[SeamStatus, ...]):
    """The state of each seam: a tuple that shows itself."""

    __slots__ = ()

    def facts(self) -> Mapping[str, str]:
        """How many seams there are, and in each state."""
        states = Counter(str(seam.state) for seam in self)
        return {"seams": str(len(self)), **{state: str(n) for state, n in states.items()}}

    def tables(self) -> Sequence[Table]:
        """The state of each."""
        rows = tuple((seam.seam, str(seam.state), seam.reason) for seam in self)
        return [Table("Seams", ("seam", "state", "reason"), rows, names=frozenset({1, 2}))]


def status() -> Seams:
    """The state of each seam, with the reason where it is not simply applied.

    Example:
        >>> for seam in nxdi_expertscale.status():
        ...     print(seam.seam, seam.state, seam.reason)
    """
    return Seams(engine.status())


def active_plugins() -> tuple[str, ...]:
    """Names of the plugins that are activated in this process."""
    return _active_plugins


def plugin_problems() -> tuple[str, ...]:
    """What is wrong with the plugins that were loaded in this process, one line each."""
    return registry.problems
