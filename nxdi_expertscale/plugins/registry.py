"""The plugins that are in force in this process, loaded once for each value of ``NXDI_PLUGINS``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.locks import fork_safe_lock
from nxdi_expertscale.plugins.manager import Plugins, allowed_names, load_plugins


class PluginRegistry:
    """Keeps the plugins that were loaded last. Safe in threads.

    Problems with plugins are printed to stderr, each line once: the program goes on.
    """

    def __init__(self, lock: threading.RLock | None = None) -> None:
        """Load nothing yet.

        Args:
            lock: Guards the registry. It is held for moments only, never while plugins are
                loaded: their modules may wait for another thread's import.
        """
        self._lock = lock or threading.RLock()
        self._plugins: Plugins | None = None
        self._problems: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the plugins that were loaded, one line each."""
        return self._problems

    def plugins(self) -> Plugins:
        """The plugins that ``NXDI_PLUGINS`` allows now, loaded anew only where that changed."""
        plugins = self._plugins
        if plugins is None or plugins.allowed != allowed_names():
            return self.reload()
        return plugins

    def reload(self) -> Plugins:
        """Load the plugins that ``NXDI_PLUGINS`` allows now, newly installed ones as well."""
        plugins = load_plugins(allowed_names())
        with self._lock:
            self._plugins = plugins
            new_problems = [line for line in plugins.problems if line not in self._problems]
            self._problems += tuple(new_problems)
        _print(new_problems)
        return plugins

    def clear(self) -> None:
        """Forget the plugins and their problems."""
        with self._lock:
            self._plugins = None
            self._problems = ()


def _print(problems: Iterable[str]) -> None:
    # There is no stderr in a process that was started with it closed.
    if sys.stderr is not None:
        for problem in problems:
            print(f"nxdi-expertscale: {problem}", file=sys.stderr)  # noqa: T201


registry = PluginRegistry(fork_safe_lock())
"""The plugins of this process."""


def families_in_force() -> tuple[MoEFamily, ...]:
    """The families of the plugins that ``NXDI_PLUGINS`` allows, for reading checkpoints."""
    return registry.plugins().families
