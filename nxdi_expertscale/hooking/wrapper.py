"""Replaces a function by a wrapper around it, and restores the very object that was there."""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import wrapt

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""A wrapt wrapper: ``(wrapped, instance, args, kwargs)``."""


_namespace_of_module = vars(ModuleType)["__dict__"].__get__


def namespace_of(module: ModuleType) -> dict[str, Any]:
    """The global variables of a module, without running any code that its type may have."""
    namespace: dict[str, Any] = _namespace_of_module(module)
    return namespace


@dataclass(frozen=True)
class Place:
    """A module's or a class's attribute.

    Attributes:
        parent: The module or the class that the attribute is looked up in; None if there is none.
        name: The attribute's name in it.
        current: The object there, before its descriptor is called; None if there is none.
    """

    parent: Any
    name: str
    current: Any


def find_place(module: ModuleType, attribute: str) -> Place:
    """Find an attribute of a module.

    Args:
        module: The module.
        attribute: Dotted name, such as ``MoENeuronConfig.__init__``. A class may inherit it.
    """
    *path, name = attribute.split(".")
    parent: Any = module
    for part in path:
        parent = getattr(parent, part, None)
    holders = parent.__mro__ if isinstance(parent, type) else (parent,)
    found = [vars(holder)[name] for holder in holders if name in getattr(holder, "__dict__", ())]
    return Place(parent, name, found[0] if found else None)


def defines(module: ModuleType, attribute: str) -> bool:
    """Whether a function is a module's own, and not one that it imports from another.

    Args:
        module: The module; the code of a type of its own is not run.
        attribute: The function's dotted name.
    """
    path, _, _ = attribute.partition(".")
    if path not in namespace_of(module):
        return False
    function = find_place(module, attribute).current
    function = getattr(function, "__func__", function)
    return getattr(function, "__module__", None) == namespace_of(module).get("__name__")


def unwrapping(function: Any) -> Iterator[Any]:
    """A function, what it wraps, and so on to the innermost."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


class _PatchedMethod(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]
    """A patched method, looked up on an instance or on a class."""

    @property
    def is_in_force(self) -> bool:
        return bool(self._self_parent.is_in_force)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        instance = self._self_instance
        if instance is None or isinstance(instance, type):
            return self
        return getattr(copy.deepcopy(instance, memo), self._self_parent.name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._self_instance is None:
            return self._self_parent.__reduce_ex__(protocol)
        return getattr, (self._self_instance, self._self_parent.name)


# wrapt's classes take type arguments from 2.0 on only.
class PatchedFunction(wrapt.FunctionWrapper):  # type: ignore[type-arg]
    """A function with a wrapper around it, copied and pickled as functions are: by name."""

    __bound_function_wrapper__ = _PatchedMethod

    def __init__(
        self,
        wrapped: Any,
        wrapper: Wrapper,
        *,
        module: str,
        attribute: str,
        is_in_force: Callable[[], bool],
    ) -> None:
        """Wrap a function.

        Args:
            wrapped: The function, or the descriptor that stands in its class.
            wrapper: What is called in its place.
            module: Module in which it is found.
            attribute: Its dotted name there.
            is_in_force: Called at each call; where it gives False, ``wrapped`` is called alone.
        """
        super().__init__(wrapped, wrapper, enabled=is_in_force)
        self._self_module = module
        self._self_attribute = attribute
        self._self_is_in_force = is_in_force

    @property
    def home(self) -> str:
        """Name of the module in which it is found."""
        return str(self._self_module)

    @property
    def name(self) -> str:
        """Its name in the class or module that holds it."""
        return str(self._self_attribute).rpartition(".")[2]

    @property
    def is_in_force(self) -> bool:
        """Whether a call goes through the wrapper."""
        return bool(self._self_is_in_force())

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return pkgutil.resolve_name, (f"{self._self_module}:{self._self_attribute}",)


WRAPPERS = (PatchedFunction, _PatchedMethod)
"""The types of our wrappers."""


def without_idle_wrappers(function: Any) -> Any:
    """A function without those wrappers of ours around it that are not in force any more."""
    while type(function) in WRAPPERS and not function.is_in_force:
        function = function.__wrapped__
    return function


_INHERITED = object()


class Installation:
    """A patched function in its place, and under other names of it; it can be undone."""

    def __init__(self, place: Place, wrapper: Wrapper, **settings: Any) -> None:
        """Install a wrapper.

        Args:
            place: What to replace.
            wrapper: What is called in its place.
            settings: The other arguments of :class:`PatchedFunction`.

        Raises:
            TypeError: The class does not let its attributes be set.
        """
        # A wrapper of ours stays behind where another tool had wrapped it; that one is gone now.
        wrapped = without_idle_wrappers(place.current)
        self._place = place
        self._wrapped = wrapped
        self._original = wrapped if place.name in vars(place.parent) else _INHERITED
        self._function = PatchedFunction(wrapped, wrapper, **settings)
        setattr(place.parent, place.name, self._function)
        self._aliases: list[Place] = []

    @property
    def function(self) -> Any:
        """The function that is wrapped, of a static method the function within.

        None where it is inherited, or imported from another module: whoever else refers to it
        then does not mean what is patched here.
        """
        function = getattr(self._wrapped, "__func__", self._wrapped)
        is_own = getattr(function, "__module__", None) == self._function.home
        return function if is_own and self._original is not _INHERITED else None

    def is_part_of(self, function: Any) -> bool:
        """Whether a function is the one installed, or other wrappers around it."""
        return any(inner is self._function for inner in unwrapping(function))

    def wraps(self, function: Any) -> bool:
        """Whether a function is the one that is wrapped, or idle wrappers of ours around it."""
        return self.function is not None and without_idle_wrappers(function) is self.function

    def replace_alias(self, alias: Place) -> None:
        """Bind another module's name for the function to the patched one.

        Args:
            alias: A global variable of a module; left alone where it has changed since.
        """
        patched: Any = self._function
        if isinstance(self._place.parent, type):
            # As it is looked up in its class.
            patched = self._function.__get__(None, self._place.parent)
        namespace = namespace_of(alias.parent)
        if namespace.get(alias.name) is alias.current:
            namespace[alias.name] = patched
            self._aliases.append(Place(alias.parent, alias.name, patched))

    def undo(self) -> None:
        """Restore what was there, the very same object.

        A wrapper that another tool has wrapped in turn, or that was imported by name, stays
        where it is. It is not in force any more, and calls the function alone.
        """
        for alias in self._aliases:
            namespace = namespace_of(alias.parent)
            if namespace.get(alias.name) is alias.current:
                namespace[alias.name] = self.function
        parent, name = self._place.parent, self._place.name
        if vars(parent).get(name) is not self._function:
            return
        if self._original is _INHERITED:
            delattr(parent, name)
        else:
            setattr(parent, name, self._original)
