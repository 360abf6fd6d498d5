"""Finds by what else a function can be called: other names of it, and objects that hold it.

Namespaces are read as they are: no attribute of a module or of a class is asked for, which might
run code of theirs, or import a module that is loaded lazily.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from nxdi_expertscale.hooking.wrapper import WRAPPERS, Place, without_idle_wrappers

_DEPTH = 4
"""How far a module's variables are looked into: a class, its method, that one's closure, a dict."""


@dataclass(frozen=True)
class Holder:
    """A global variable of a module that is not a function but holds it, such as a partial.

    Attributes:
        function: The function that is held.
        module: Name of the module.
        variable: Name of the variable, for a class with the attribute: ``Model.convert``.
    """

    function: Any
    module: str
    variable: str


def loaded_modules() -> list[ModuleType]:
    """Every module there is, each once."""
    found = {id(module): module for module in list(sys.modules.values())}
    # Not isinstance, for which an object may pretend to be a module.
    return [module for module in found.values() if issubclass(type(module), ModuleType)]


def modules_imported_by(module: ModuleType) -> list[ModuleType]:
    """A module, and those imported while it was executed, or still being so.

    No other one can have a function that came to be in its execution. In order to be right where
    it was reloaded, or where several threads import, these may be too many.
    """
    modules = loaded_modules()
    names = [id(other) for other in modules]
    begin = names.index(id(module)) if id(module) in names else 0
    return [
        other for place, other in enumerate(modules) if place >= begin or _is_initializing(other)
    ]


def find_aliases(functions: Collection[Any], modules: Collection[ModuleType]) -> list[Place]:
    """The global variables of these modules that are one of the functions.

    A wrapper of ours that is not in force any more stands for the function in it.
    """
    wanted = {id(function) for function in functions}
    return [
        Place(module, name, value)
        for module in modules
        for name, value in list(_namespace(module).items())
        if id(without_idle_wrappers(value)) in wanted
    ]


def find_holders(functions: Collection[Any], modules: Collection[ModuleType]) -> list[Holder]:
    """The global variables of these modules that hold one of the functions.

    Looked into are functions (defaults and closures), attributes of the module's own classes,
    partials, caches and built-in containers.
    """
    wanted = {id(function): function for function in functions}
    return [
        Holder(wanted[key], str(_namespace(module).get("__name__")), variable)
        for module in modules
        for variable, value in _variables(module)
        for key in _held(value, wanted.keys(), _DEPTH)
    ]


def _variables(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The variables of a module that may hold a function, those of its own classes included."""
    namespace = _namespace(module)
    for name, value in list(namespace.items()):
        if type(value) in _READERS:
            yield name, value
        elif issubclass(type(value), type):
            attributes = type.__getattribute__(value, "__dict__").copy()
            if attributes.get("__module__") == namespace.get("__name__"):
                for key, item in attributes.items():
                    # In a tuple, for here it counts whether the item itself is a function.
                    yield f"{name}.{key}", (item,)


def _held(value: Any, wanted: Collection[int], depth: int) -> set[int]:
    """The identities of the functions that an object holds."""
    found = set()
    for content in _READERS[type(value)](value):
        if id(content) in wanted or type(content) in WRAPPERS:
            found |= {id(without_idle_wrappers(content))}.intersection(wanted)
        elif depth > 1 and type(content) in _READERS:
            found |= _held(content, wanted, depth - 1)
    return found


def _contents_of_function(function: FunctionType) -> Iterable[Any]:
    contents = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        # A variable that is not set yet leaves its cell empty.
        with contextlib.suppress(ValueError):
            contents.append(cell.cell_contents)
    return contents


_READERS: dict[type, Callable[[Any], Iterable[Any]]] = {
    FunctionType: _contents_of_function,
    staticmethod: lambda method: (method.__func__,),
    classmethod: lambda method: (method.__func__,),
    functools.partial: lambda call: (call.func, *call.args, *call.keywords.values()),
    type(functools.lru_cache(print)): lambda cached: (getattr(cached, "__wrapped__", None),),
    dict: lambda mapping: list(mapping.values()),
    list: list,
    tuple: tuple,
    set: list,
    frozenset: tuple,
}


def _namespace(module: ModuleType) -> dict[str, Any]:
    found = object.__getattribute__(module, "__dict__")
    return found if isinstance(found, dict) else {}


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(_namespace(module).get("__spec__"), "_initializing", False))
