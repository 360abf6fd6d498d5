"""Applies patches when the modules that they name are imported, and takes them off again.

A patch is checked against its seam before it is applied. The outcome is kept and shown: no patch
is skipped in silence, and a seam that does not fit never breaks the import of upstream.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterable, Sequence
from types import ModuleType

from nxdi_expertscale.hooking.locks import fork_safe_lock
from nxdi_expertscale.hooking.patch import Patch, SeamStatus, State
from nxdi_expertscale.hooking.watcher import ImportWatcher, is_loaded
from nxdi_expertscale.hooking.wrapper import Installation, Place, find

_logger = logging.getLogger(__name__)

_NOWHERE = Place(parent=None, name="", current=None)


class _Seam:
    """A patch, its state, and where its wrapper is installed: anew after each reload."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self._state = State.WAITING
        self._reason = ""
        self._installations: list[Installation] = []
        self._in_force = True

    def status(self) -> SeamStatus:
        patch = self.patch
        return SeamStatus(patch.seam, patch.module, patch.attribute, self._state, self._reason)

    def update(self, place: Place, state: State, reason: str) -> bool:
        """Set the state, and install the wrapper where it fits and is not installed yet.

        Returns:
            Whether this is worth a line in the log: the wrapper was installed, or the state or
            its reason has changed.
        """
        is_installed = any(part.is_part_of(place.current) for part in self._installations)
        if not self._in_force or is_installed:
            return False
        if state is State.APPLIED:
            try:
                self._install(place)
            except TypeError as error:
                state, reason = State.INCOMPATIBLE, str(error)
        has_changed = state is State.APPLIED or (state, reason) != (self._state, self._reason)
        self._state, self._reason = state, reason
        return has_changed

    def uninstall(self) -> None:
        """Take the wrapper off wherever it is installed; it is not installed again."""
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


class Engine:
    """A set of patches, applied as their modules are imported. Safe in threads."""

    def __init__(self, lock: threading.RLock | None = None) -> None:
        """Start with no patch.

        Args:
            lock: Guards the set. It is held for moments only, never while a module is imported
                or a seam is checked.
        """
        self._lock = lock or threading.RLock()
        self._seams: dict[str, _Seam] = {}
        self._watcher = ImportWatcher(self._on_loaded)

    def activate(self, patches: Iterable[Patch]) -> None:
        """Add patches, and apply those whose modules are imported already.

        A patch whose seam has one already is ignored: activating twice is activating once.
        """
        with self._lock:
            for patch in patches:
                self._seams.setdefault(patch.seam, _Seam(patch))
            modules = dict.fromkeys(seam.patch.module for seam in self._seams.values())
            self._watcher.watch(tuple(modules))
        # Outside the lock: it may wait for a thread whose import calls back to us.
        self._watcher.report_loaded()

    def deactivate(self) -> None:
        """Remove every patch, and put back the very objects that were there before."""
        with self._lock:
            self._watcher.watch(())
            for seam in self._seams.values():
                seam.uninstall()
            self._seams.clear()

    def status(self) -> tuple[SeamStatus, ...]:
        """The state of each seam, in the order in which the patches were added."""
        self._watcher.report_finished()
        with self._lock:
            return tuple(seam.status() for seam in self._seams.values())

    def find_failed_seam(self, names: Sequence[str], *, load: bool = False) -> str | None:
        """Find the first of these seams that is known not to be patched.

        Args:
            names: Names of seams.
            load: Import the modules of these seams that are not imported yet. Whoever has a
                model's config is about to import them anyway, and one that is missing must be
                found before anything is compiled.

        Returns:
            The seam's name, its place and why it is not patched, as a part of a sentence; None
            where each is applied, native, or still waits for its module to be imported.
        """
        if load:
            self._load(names)
        statuses = {status.seam: status for status in self.status()}
        for name in names:
            status = statuses.get(name)
            if status is None:
                return f"seam {name!r}: no active patch has this name"
            where = f"seam {name!r} ({status.module}.{status.attribute})"
            if status.state is State.INCOMPATIBLE:
                return f"{where}: {status.reason}"
            if status.state is State.WAITING and is_loaded(status.module):
                return f"{where}: the module came to be without being imported"
        return None

    def _load(self, names: Sequence[str]) -> None:
        with self._lock:
            seams = [seam for name, seam in self._seams.items() if name in names]
        for seam in seams:
            if seam.status().state is not State.WAITING:
                continue
            try:
                importlib.import_module(seam.patch.module)
            except Exception as error:
                reason = f"it cannot be imported: {type(error).__name__}: {error}"
                with self._lock:
                    seam.update(_NOWHERE, State.INCOMPATIBLE, reason)

    def _on_loaded(self, module: ModuleType) -> None:
        with self._lock:
            seams = [seam for seam in self._seams.values() if seam.patch.module == module.__name__]
        for seam in seams:
            place = find(module, seam.patch.attribute)
            state, reason = _check(seam.patch, module, place)
            with self._lock:
                has_changed = seam.update(place, state, reason)
            if has_changed:
                _log(seam.status())


def _check(patch: Patch, module: ModuleType, place: Place) -> tuple[State, str]:
    """Whether a patch is to be applied to a module that was imported, and why not."""
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


def _log(status: SeamStatus) -> None:
    where = f"{status.module}.{status.attribute}"
    if status.state is State.APPLIED:
        _logger.info("patched %s (%s)", where, status.seam)
    elif status.state is State.NATIVE:
        _logger.info("%s: %s", where, status.reason)
    else:
        _logger.warning("%s not patched: %s", where, status.reason)


engine = Engine(fork_safe_lock())
"""The patches that are active in this process."""
