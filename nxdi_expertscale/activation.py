"""Applies the registered patches when the modules that they name are imported; takes them off.

A patch is checked against the seam before it is applied. What comes of it is kept and shown:
nothing is skipped in silence, and a seam that does not fit never breaks the import of upstream.
"""

from __future__ import annotations

import enum
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import wrapt

from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.importing import ImportWatcher, name_of
from nxdi_expertscale.plugins import PluginManager, load_plugins, print_problems

_logger = logging.getLogger("nxdi_expertscale")

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""A wrapt wrapper: ``(wrapped, instance, args, kwargs)``."""

FEATURE = "expert_wise_scale"
"""The name by which upstream would know the feature, if it had it."""


@dataclass(frozen=True)
class Patch:
    """One upstream function, and what is wrapped around it.

    Attributes:
        seam: Name of the seam in messages, such as ``config`` or ``state_dict:qwen3_moe``.
        module: Upstream module that holds it; the patch is applied when it is imported.
        attribute: Dotted name within the module, such as ``MoENeuronConfig.__init__``.
        wrapper: What is called in its place, the wrapt way.
        misfit: Says why the seam of this module is not the one that the patch knows, or None
            where it fits. That the attribute exists and can be called is checked before.
        native: Whether this upstream has the feature at this seam already.
        guard: Whether the patch only watches over another one. A guard that does not fit is
            reported, and takes nothing away from users of the feature.
    """

    seam: str
    module: str
    attribute: str
    wrapper: Wrapper
    misfit: Callable[[ModuleType], str | None] = lambda _module: None
    native: Callable[[ModuleType], bool] = lambda _module: False
    guard: bool = False


class State(str, enum.Enum):
    """What became of a patch."""

    WAITING = "waiting"
    """The module is not imported yet."""
    APPLIED = "applied"
    NATIVE = "native"
    """Upstream has the feature itself; the patch stands aside."""
    INCOMPATIBLE = "incompatible"
    """The seam is not the one that the patch knows; the reason says how it differs."""

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class SeamStatus:
    """The state of one seam."""

    seam: str
    module: str
    attribute: str
    state: State
    reason: str = ""


@dataclass
class _Seam:
    """A patch and what became of it."""

    patch: Patch
    state: State = State.WAITING
    reason: str = ""
    parent: Any = None
    original: Any = None
    installed: Any = None
    in_force: bool = True

    def status(self) -> SeamStatus:
        patch = self.patch
        return SeamStatus(patch.seam, patch.module, patch.attribute, self.state, self.reason)


class Activation:
    """The patches that are in force in this process. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._seams: dict[str, _Seam] = {}
        self._watcher = ImportWatcher(self._on_loaded)
        self._plugins: tuple[str, ...] = ()
        self._problems: tuple[str, ...] = ()

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
            modules = tuple(dict.fromkeys(seam.patch.module for seam in self._seams.values()))
        # Outside the lock: it may wait for a thread whose import reports to us.
        self._watcher.watch(modules)
        return news

    def deactivate(self) -> None:
        """Take every patch off: what was there before is there again, the very same object."""
        self._watcher.watch(())
        with self._lock:
            for seam in self._seams.values():
                _remove(seam)
            self._seams.clear()
            self._plugins, self._problems = (), ()

    def status(self) -> tuple[SeamStatus, ...]:
        """The state of each seam."""
        self._watcher.report_finished()
        with self._lock:
            return tuple(seam.status() for seam in self._seams.values())

    def _on_loaded(self, module: ModuleType) -> None:
        with self._lock:
            for seam in self._seams.values():
                if seam.patch.module == name_of(module):
                    _apply(seam, module)


def _apply(seam: _Seam, module: ModuleType) -> None:
    """Apply a patch to its module, freshly loaded or not, once."""
    patch = seam.patch
    try:
        parent, name, current = _resolve(module, patch.attribute)
        if current is seam.installed and seam.state is State.APPLIED:
            return
        seam.state, seam.reason = _judge(patch, module, current)
        if seam.state is State.APPLIED:
            _install(seam, parent, name)
    except Exception as error:
        # Whatever is wrong with the seam must not break those who do not use the feature.
        seam.state, seam.reason = State.INCOMPATIBLE, f"{type(error).__name__}: {error}"
    if seam.state is State.APPLIED:
        _logger.info("patched %s.%s (%s)", patch.module, patch.attribute, patch.seam)
    elif seam.state is State.NATIVE:
        _logger.info("%s.%s: %s", patch.module, patch.attribute, seam.reason)
    else:
        _logger.warning("%s.%s not patched: %s", patch.module, patch.attribute, seam.reason)


def _judge(patch: Patch, module: ModuleType, current: Any) -> tuple[State, str]:
    if current is None:
        return State.INCOMPATIBLE, f"{patch.module} has no {patch.attribute}"
    if not callable(current) and not isinstance(current, staticmethod | classmethod):
        return State.INCOMPATIBLE, f"{patch.module}.{patch.attribute} cannot be called"
    if patch.native(module):
        return State.NATIVE, "this upstream has the feature itself"
    reason = patch.misfit(module)
    return (State.APPLIED, "") if reason is None else (State.INCOMPATIBLE, reason)


def _resolve(module: ModuleType, attribute: str) -> tuple[Any, str, Any]:
    """The object that holds an attribute, the attribute's name, and what is there, or None."""
    *path, name = attribute.split(".")
    parent: Any = module
    for part in path:
        parent = getattr(parent, part, None)
    # What stands in the class itself, not what its descriptors make of it: it is put back as is.
    return parent, name, vars(parent).get(name) if parent is not None else None


def _install(seam: _Seam, parent: Any, name: str) -> None:
    seam.parent, seam.original = parent, vars(parent)[name]
    seam.installed = wrapt.FunctionWrapper(
        seam.original, seam.patch.wrapper, enabled=lambda: seam.in_force
    )
    setattr(parent, name, seam.installed)


def _remove(seam: _Seam) -> None:
    # A wrapper that another tool has wrapped in turn, or imported by name, cannot be taken out
    # from under it: it stays, and from now on calls straight through.
    seam.in_force = False
    if seam.state is not State.APPLIED:
        return
    name = seam.patch.attribute.rpartition(".")[2]
    if vars(seam.parent).get(name) is seam.installed:
        setattr(seam.parent, name, seam.original)


_activation = Activation()


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


def require(seams: Iterable[str]) -> None:
    """Make sure that these seams hold, for someone who uses the feature.

    Raises:
        IncompatibleUpstreamError: One does not; the message names it and the reason.
    """
    statuses = {seam.seam: seam for seam in status()}
    for name in seams:
        seam = statuses.get(name)
        if seam is None:
            raise IncompatibleUpstreamError(
                f"expert_wise_scale: nothing is registered for the seam {name!r}; is the plugin "
                f"allowed by NXDI_PLUGINS?"
            )
        if seam.state is State.INCOMPATIBLE:
            raise IncompatibleUpstreamError(_incompatible_message(seam))
        if seam.state is State.WAITING and seam.module in sys.modules:
            raise IncompatibleUpstreamError(
                _incompatible_message(seam) + "it was imported before the patch could be applied"
            )


def _incompatible_message(seam: SeamStatus) -> str:
    return (
        f"expert_wise_scale cannot work with this NxDI: seam {seam.seam!r} "
        f"({seam.module}.{seam.attribute}): {seam.reason}. "
        "Turn expert_wise_scale off, or install a release that is supported "
        "(run 'nxdi-expertscale doctor')."
    )


def mentions(function: Any, name: str) -> bool:
    """Whether a function's own code uses a name: a variable, an attribute, a key or a parameter.

    Nested functions count. Wrappers around it are looked through.
    """
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return isinstance(code, CodeType) and _code_mentions(code, name)


def _code_mentions(code: CodeType, name: str) -> bool:
    constants = code.co_consts
    return (
        name in (*code.co_names, *code.co_varnames)
        or name in constants
        or any(_code_mentions(inner, name) for inner in constants if isinstance(inner, CodeType))
    )
