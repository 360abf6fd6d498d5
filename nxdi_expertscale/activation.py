"""Applies the registered patches when the modules that they name are imported; takes them off.

A patch is checked against the seam before it is applied. What comes of it is kept and shown:
nothing is skipped in silence, and a seam that does not fit never breaks the import of upstream.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
from collections.abc import Sequence
from types import ModuleType

from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.hooking.patch import Patch, SeamStatus, State
from nxdi_expertscale.hooking.watcher import ImportWatcher, is_loaded, name_of
from nxdi_expertscale.hooking.wrapper import Installation, Place, find
from nxdi_expertscale.plugins.manager import PluginManager, load_plugins, print_problems

_logger = logging.getLogger("nxdi_expertscale")

FEATURE = "expert_wise_scale"
"""The name by which upstream would know the feature, if it had it."""


class _Seam:
    """A patch, what became of it, and where it is installed: anew after each reload."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self._state = State.WAITING
        self._reason = ""
        self._installations: list[Installation] = []
        self._in_force = True

    def status(self) -> SeamStatus:
        patch = self.patch
        return SeamStatus(patch.seam, patch.module, patch.attribute, self._state, self._reason)

    def settle(self, place: Place, state: State, reason: str) -> bool:
        """Note what was found, and install the wrapper where it fits and is not there yet.

        Returns:
            Whether there is news.
        """
        installed = any(part.is_part_of(place.current) for part in self._installations)
        if not self._in_force or installed:
            return False
        if state is State.APPLIED:
            try:
                self._install(place)
            except TypeError as error:
                state, reason = State.INCOMPATIBLE, str(error)
        news = state is State.APPLIED or (state, reason) != (self._state, self._reason)
        self._state, self._reason = state, reason
        return news

    def remove(self) -> None:
        """Take the wrapper off, wherever it was installed."""
        self._in_force = False
        for installation in reversed(self._installations):
            installation.undo()

    def _install(self, place: Place) -> None:
        installation = Installation(
            place,
            self.patch.wrapper,
            module=self.patch.module,
            attribute=self.patch.attribute,
            is_in_force=lambda: self._in_force,
        )
        self._installations.append(installation)


_NOWHERE = Place(parent=None, name="", current=None)


class Activation:
    """The patches that are in force in this process. Safe in threads."""

    def __init__(self) -> None:
        # Held for moments only: never while a module is imported, nor while a patch is judged.
        self._lock = threading.RLock()
        self._seams: dict[str, _Seam] = {}
        self._watcher = ImportWatcher(self._on_loaded)
        self._plugins: tuple[str, ...] = ()
        self._problems: tuple[str, ...] = ()

    def hold_still_at_fork(self) -> None:
        """Let no other thread be in the midst of a change when this process forks."""
        os.register_at_fork(
            before=self._lock.acquire,
            after_in_parent=self._lock.release,
            after_in_child=self._lock.release,
        )

    @property
    def plugins(self) -> tuple[str, ...]:
        """Names of the plugins that are activated."""
        return self._plugins

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with plugins, one line each."""
        return self._problems

    def activate(self, manager: PluginManager) -> tuple[str, ...]:
        """Put the plugins' patches in force; what is in force already stays as it is.

        Returns:
            What is wrong with the plugins and was not known before, one line each.
        """
        patches = manager.patches()
        with self._lock:
            self._plugins = tuple(dict.fromkeys((*self._plugins, *manager.names)))
            news = tuple(line for line in manager.problems if line not in self._problems)
            self._problems += news
            for patch in patches:
                self._seams.setdefault(patch.seam, _Seam(patch))
            self._watcher.watch(
                tuple(dict.fromkeys(seam.patch.module for seam in self._seams.values()))
            )
        # Outside the lock: it may wait for a thread whose import reports to us.
        self._watcher.report_loaded()
        return news

    def deactivate(self) -> None:
        """Take every patch off: what was there before is there again, the very same object."""
        with self._lock:
            self._watcher.watch(())
            for seam in self._seams.values():
                seam.remove()
            self._seams.clear()
            self._plugins, self._problems = (), ()

    def status(self) -> tuple[SeamStatus, ...]:
        """The state of each seam."""
        self._watcher.report_finished()
        with self._lock:
            return tuple(seam.status() for seam in self._seams.values())

    def load(self, names: Sequence[str]) -> None:
        """Import the modules of these seams that nobody has imported yet."""
        with self._lock:
            waiting = [seam for name, seam in self._seams.items() if name in names]
        for seam in waiting:
            if seam.status().state is not State.WAITING:
                continue
            try:
                importlib.import_module(seam.patch.module)
            except Exception as error:
                reason = f"it cannot be imported: {type(error).__name__}: {error}"
                with self._lock:
                    seam.settle(_NOWHERE, State.INCOMPATIBLE, reason)

    def _on_loaded(self, module: ModuleType) -> None:
        with self._lock:
            seams = [s for s in self._seams.values() if s.patch.module == name_of(module)]
        for seam in seams:
            place = find(module, seam.patch.attribute)
            state, reason = _judge(seam.patch, module, place)
            with self._lock:
                news = seam.settle(place, state, reason)
            if news:
                _log(seam.status())


def _log(seam: SeamStatus) -> None:
    where = f"{seam.module}.{seam.attribute}"
    if seam.state is State.APPLIED:
        _logger.info("patched %s (%s)", where, seam.seam)
    elif seam.state is State.NATIVE:
        _logger.info("%s: %s", where, seam.reason)
    else:
        _logger.warning("%s not patched: %s", where, seam.reason)


def _judge(patch: Patch, module: ModuleType, place: Place) -> tuple[State, str]:
    current = place.current
    if current is None:
        return State.INCOMPATIBLE, f"{patch.module} has no {patch.attribute}"
    if not callable(current) and not isinstance(current, staticmethod | classmethod):
        return State.INCOMPATIBLE, f"{patch.module}.{patch.attribute} cannot be called"
    try:
        if patch.is_native(module):
            return State.NATIVE, "this upstream has the feature itself"
        reason = patch.find_incompatibility(module)
    except Exception as error:
        # Whatever is wrong with the seam must not break those who do not use the feature.
        return State.INCOMPATIBLE, f"{type(error).__name__}: {error}"
    return (State.APPLIED, "") if reason is None else (State.INCOMPATIBLE, reason)


_activation = Activation()
_activation.hold_still_at_fork()


def activate() -> None:
    """Put the installed plugins' patches in force, as far as ``NXDI_PLUGINS`` allows them.

    Each patch is applied when the module that it names is imported, or at once if it already
    is. Activating twice is activating once.
    """
    print_problems(_activation.activate(load_plugins()))


def deactivate() -> None:
    """Take every patch off; upstream's own objects are there again, the very same."""
    _activation.deactivate()


def status() -> tuple[SeamStatus, ...]:
    """The state of each seam: waiting, applied, native, or incompatible with a reason."""
    return _activation.status()


def active_plugins() -> tuple[str, ...]:
    """Names of the plugins that are activated in this process."""
    return _activation.plugins


def plugin_problems() -> tuple[str, ...]:
    """What is wrong with the plugins that this process was to activate, one line each."""
    return _activation.problems


def unmet(seams: Sequence[str], *, load: bool = False) -> str | None:
    """Say which of these seams does not hold and why, or None where none is known not to.

    Args:
        seams: Their names.
        load: Import the modules that are not imported yet. Whoever has a model's config is about
            to import them anyway, and a module that is not there must be found before anything
            is compiled.
    """
    if load:
        _activation.load(seams)
    statuses = {seam.seam: seam for seam in status()}
    for name in seams:
        seam = statuses.get(name)
        if seam is None:
            return (
                f"seam {name!r}: nothing is registered for it; does NXDI_PLUGINS allow the plugin?"
            )
        where = f"seam {name!r} ({seam.module}.{seam.attribute})"
        if seam.state is State.INCOMPATIBLE:
            return f"{where}: {seam.reason}"
        if seam.state is State.WAITING and is_loaded(seam.module):
            return f"{where}: the module came to be without being imported"
    return None


def require(seams: Sequence[str], *, load: bool = False) -> None:
    """Make sure that these seams hold, for someone who uses the feature; see :func:`unmet`.

    Raises:
        IncompatibleUpstreamError: One does not; the message names it and the reason.
    """
    reason = unmet(seams, load=load)
    if reason is not None:
        raise IncompatibleUpstreamError(
            f"expert_wise_scale cannot work with this NxDI: {reason}. Turn expert_wise_scale off, "
            "or install a release that is supported (run 'nxdi-expertscale doctor')"
        )
