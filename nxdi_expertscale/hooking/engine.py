"""Applies patches when the modules that they name are imported, and takes them off again.

A patch is checked against its seam before it is applied. The outcome is kept and shown: no patch
is skipped in silence, and a seam that does not fit never breaks the import of upstream.

Modules that have imported a function by name before it was patched get the patched one as well.
Where it is held in another way, such as a default argument, the seam is partial, and says so.

A patch of a file in whatever package (``*.modeling_olmoe``) is applied to each module of that name
that defines the function; a module of that name that does not is another one's.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import sys
import threading
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from nxdi_expertscale.hooking.locks import fork_safe_lock
from nxdi_expertscale.hooking.module_names import (
    ANY_PACKAGE,
    is_in_any_package,
    matches_module,
)
from nxdi_expertscale.hooking.patch import Patch, SeamStatus, State
from nxdi_expertscale.hooking.references import (
    Holder,
    are_held,
    find_aliases,
    find_holders,
    loaded_modules,
    modules_imported_by,
)
from nxdi_expertscale.hooking.watcher import ImportWatcher, is_loaded
from nxdi_expertscale.hooking.wrapper import (
    Installation,
    Place,
    defines,
    find_place,
    namespace_of,
)

_logger = logging.getLogger(__name__)

_NOWHERE = Place(parent=None, name="", current=None)
_FAILED = (State.ABSENT, State.INCOMPATIBLE, State.PARTIAL)
_WORST_FIRST = (State.INCOMPATIBLE, State.PARTIAL, State.NATIVE, State.APPLIED)


class _Seam:
    """A patch, its state, and where its wrapper is installed: anew after each reload."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self._state = State.WAITING
        self._reason = ""
        self._installations: list[Installation] = []
        self._holders: list[Holder] = []
        self._in_force = True

    def find_in(self, module: ModuleType) -> _Seam | None:
        """The seam itself, if it is one of this module."""
        return self if module.__name__ == self.patch.module else None

    @property
    def is_checked(self) -> bool:
        """Whether its module was found, and compared with what the patch knows."""
        return self._state is not State.WAITING

    def status(self) -> SeamStatus:
        state, reason = self._state, self._reason
        if state is State.APPLIED and (holder := self._find_holder()):
            state = State.PARTIAL
            reason = (
                f"{holder.module}.{holder.variable} holds the function as it was before it was "
                f"patched, because {holder.module} was imported before"
            )
        elif state is State.WAITING and is_loaded(self.patch.module):
            state = State.INCOMPATIBLE
            reason = "the module came to be without being imported"
        return SeamStatus(self.patch.seam, self.patch.module, self.patch.attribute, state, reason)

    def update(self, place: Place, state: State, reason: str) -> Installation | None:
        """Set the state, and install the wrapper where it fits and is not installed yet.

        Returns:
            The new installation, if there is one.
        """
        is_installed = any(part.is_part_of(place.current) for part in self._installations)
        if not self._in_force or is_installed:
            return None
        installation = None
        if state is State.APPLIED:
            try:
                installation = self._install(place)
            except TypeError as error:
                state, reason = State.INCOMPATIBLE, str(error)
        self._state, self._reason = state, reason
        return installation

    def follow(
        self, installation: Installation, aliases: Iterable[Place], holders: Iterable[Holder]
    ) -> None:
        """Put the patched function under the function's other names, and note what holds it."""
        if self._in_force:
            for alias in aliases:
                if installation.wraps(alias.current):
                    installation.replace_alias(alias)
            self._holders += [item for item in holders if installation.wraps(item.function)]

    def uninstall(self) -> None:
        """Take the wrapper off wherever it is installed; it is not installed again."""
        self._in_force = False
        for installation in reversed(self._installations):
            installation.undo()

    def _install(self, place: Place) -> Installation:
        installation = Installation(
            place,
            self.patch.wrapper,
            module=self.patch.module,
            attribute=self.patch.attribute,
            is_in_force=lambda: self._in_force,
        )
        self._installations.append(installation)
        return installation

    def _find_holder(self) -> Holder | None:
        # Its module may have been reloaded since, or its variable set.
        for holder in self._holders:
            module = sys.modules.get(holder.module)
            if module is not None and holder in find_holders([holder.function], [module]):
                return holder
        return None


class _SeamInAnyPackage:
    """A patch of a file in whatever package, and a seam for each module that turned out to be it.

    A user may have more than one copy.
    """

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self._found: dict[str, _Seam] = {}

    def find_in(self, module: ModuleType) -> _Seam | None:
        """The seam of a module, if that is the file, and defines the function."""
        name = module.__name__
        if name not in self._found and self._is_in(module):
            self._found[name] = _Seam(dataclasses.replace(self.patch, module=name))
        return self._found.get(name)

    def find_unseen(self, modules: Iterable[ModuleType]) -> list[ModuleType]:
        """The modules that are the file, and came to be in another way than by an import."""
        return [
            module
            for module in modules
            if namespace_of(module).get("__name__") not in self._found and self._is_in(module)
        ]

    def status(self) -> SeamStatus:
        """The state of the module that was found, of several the worst."""
        found = [seam.status() for seam in self._found.values() if seam.is_checked]
        if found:
            return min(found, key=lambda status: _WORST_FIRST.index(status.state))
        file = self.patch.module.removeprefix(ANY_PACKAGE)
        reason = f"no module {file} that defines {self.patch.attribute} has been imported"
        patch = self.patch
        return SeamStatus(patch.seam, patch.module, patch.attribute, State.WAITING, reason)

    def uninstall(self) -> None:
        """Take the wrapper off every module."""
        for seam in self._found.values():
            seam.uninstall()

    def _is_in(self, module: ModuleType) -> bool:
        return matches_module(self.patch.module, module) and defines(module, self.patch.attribute)


def _seam_of(patch: Patch) -> _Seam | _SeamInAnyPackage:
    return _SeamInAnyPackage(patch) if is_in_any_package(patch.module) else _Seam(patch)


class Engine:
    """A set of patches, applied as their modules are imported. Safe in threads."""

    def __init__(self, lock: threading.RLock | None = None) -> None:
        """Start with no patch.

        Args:
            lock: Guards the set. It is held for moments only, never while a module is imported
                or a seam is checked.
        """
        self._lock = lock or threading.RLock()
        self._seams: dict[str, _Seam | _SeamInAnyPackage] = {}
        self._watcher = ImportWatcher(self._on_executed, self._on_found)

    def activate(self, patches: Iterable[Patch]) -> None:
        """Add patches, and apply those whose modules are imported already.

        A patch whose seam has one already is ignored: activating twice is activating once.
        """
        with self._lock:
            for patch in patches:
                self._seams.setdefault(patch.seam, _seam_of(patch))
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

    def find_failed_seam(
        self, names: Sequence[str], *, load: bool = False, may_wait: bool = True
    ) -> SeamStatus | None:
        """Find the first of these seams that is known not to be patched, or not everywhere.

        Args:
            names: Names of seams.
            load: Import the modules of these seams that are not imported yet. Whoever has a
                model's config is about to import them anyway, and one that is missing must be
                found before anything is compiled. Where a seam is in whatever package, nothing
                is imported: modules are looked through that were loaded in another way.
            may_wait: Whether a seam may still wait for its module to be imported. That of a model
                that is being built has been.

        Returns:
            Its status, with the reason; None where each is applied, native, or waiting.
        """
        if load:
            self._load(names)
        found = {status.seam: status for status in self.status()}
        for name in names:
            absent = SeamStatus(name, "", "", State.ABSENT, "no active patch has this name")
            status = found.get(name, absent)
            if status.state in _FAILED or (status.state is State.WAITING and not may_wait):
                return status
        return None

    def _load(self, names: Sequence[str]) -> None:
        with self._lock:
            seams = [seam for name, seam in self._seams.items() if name in names]
        for seam in seams:
            if isinstance(seam, _SeamInAnyPackage):
                self._on_found(seam.find_unseen(loaded_modules()))
                continue
            if seam.status().state is not State.WAITING:
                continue
            try:
                importlib.import_module(seam.patch.module)
            except Exception as error:
                reason = f"it cannot be imported: {type(error).__name__}: {error}"
                with self._lock:
                    seam.update(_NOWHERE, State.INCOMPATIBLE, reason)

    def _on_executed(self, module: ModuleType) -> None:
        new = self._install(module)
        # In a circular import, another module has taken the functions by name by now.
        aliases = find_aliases(_functions(new), modules_imported_by(module))
        holders = find_holders(_functions(new), [module, *(alias.parent for alias in aliases)])
        self._follow(new, aliases, holders)

    def _on_found(self, modules: Sequence[ModuleType]) -> None:
        new = [installed for module in modules for installed in self._install(module)]
        if functions := _functions(new):
            others = loaded_modules()
            holders = find_holders(functions, others) if are_held(functions) else []
            self._follow(new, find_aliases(functions, others), holders)

    def _install(self, module: ModuleType) -> list[tuple[_Seam, Installation]]:
        """Check the seams of a module, and install the wrappers that fit; those that are new."""
        with self._lock:
            found = [seam.find_in(module) for seam in self._seams.values()]
        seams = [seam for seam in found if seam is not None]
        new = []
        for seam in seams:
            place = find_place(module, seam.patch.attribute)
            state, reason = _check(seam.patch, module, place)
            with self._lock:
                before = seam.status()
                installation = seam.update(place, state, reason)
                after = seam.status()
            if installation is not None:
                new.append((seam, installation))
            if installation is not None or after != before:
                _log(after)
        return new

    def _follow(
        self,
        new: Iterable[tuple[_Seam, Installation]],
        aliases: Iterable[Place],
        holders: Iterable[Holder],
    ) -> None:
        for seam, installation in new:
            with self._lock:
                seam.follow(installation, aliases, holders)
                status = seam.status()
            if status.state is State.PARTIAL:
                _log(status)


def _functions(new: Iterable[tuple[_Seam, Installation]]) -> list[Any]:
    functions = [installation.function for _, installation in new]
    return [function for function in functions if function is not None]


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
    elif status.state is State.PARTIAL:
        _logger.warning("%s is patched, but %s", where, status.reason)
    else:
        _logger.warning("%s not patched: %s", where, status.reason)


engine = Engine(fork_safe_lock())
"""The patches that are active in this process."""
