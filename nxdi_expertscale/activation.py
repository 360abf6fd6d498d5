"""Puts the patches of the installed plugins in force, and takes them off again.

The composition root: it hands the patches that :mod:`nxdi_expertscale.plugins` finds to
:mod:`nxdi_expertscale.hooking`, which knows no plugins.
"""

from __future__ import annotations

from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.locks import fork_safe_lock
from nxdi_expertscale.hooking.patch import SeamStatus
from nxdi_expertscale.plugins.manager import load_plugins, print_problems

# Held for moments only, never while plugins are loaded or modules are imported.
_lock = fork_safe_lock()
_plugins: tuple[str, ...] = ()
_problems: tuple[str, ...] = ()


def activate() -> None:
    """Put the installed plugins' patches in force, as far as ``NXDI_PLUGINS`` allows them.

    Each patch is applied when the module that it names is imported, or at once if it already
    is. Activating twice is activating once. Problems with plugins are printed to stderr once.
    """
    global _plugins, _problems  # noqa: PLW0603
    manager = load_plugins()
    patches = manager.patches()
    with _lock:
        _plugins = tuple(dict.fromkeys((*_plugins, *manager.names)))
        new_problems = tuple(line for line in manager.problems if line not in _problems)
        _problems += new_problems
    engine.activate(patches)
    print_problems(new_problems)


def deactivate() -> None:
    """Take every patch off; upstream's own objects are there again, the very same."""
    global _plugins, _problems
    with _lock:
        engine.deactivate()
        _plugins, _problems = (), ()


def status() -> tuple[SeamStatus, ...]:
    """The state of each seam: waiting, applied, native, or incompatible with a reason."""
    return engine.status()


def active_plugins() -> tuple[str, ...]:
    """Names of the plugins that are activated in this process."""
    return _plugins


def plugin_problems() -> tuple[str, ...]:
    """What is wrong with the plugins that this process was to activate, one line each."""
    return _problems
