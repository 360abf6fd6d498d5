"""Finds what refers to a function: variables of modules that are it, and those that hold it.

Namespaces are read as they are. No attribute of a module or of a class is looked up, which might
run code of theirs or import a module that is loaded lazily.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType
from typing import Any

from nxdi_expertscale.hooking.wrapper import (
    WRAPPERS,
    Place,
    namespace_of,
    without_idle_wrappers,
)

_DEPTH = 4
"""How many objects within one another are looked into, from a module's variable on."""

_namespace_of_class = vars(type)["__dict__"].__get__


@dataclass(frozen=True)
class Holder:
    """A global variable of a module that holds a function, such as a partial of it.

    Attributes:
        function: The function that is held.
        module: Name of the module.
        variable: Name of the variable; ``Model.convert`` for an attribute of a class.
    """

    function: Any
    module: str
    variable: str


def loaded_modules() -> list[ModuleType]:
    """Every loaded module, each once whatever names it has."""
    found = {id(module): module for module in list(sys.modules.values())}
    # isinstance would run the code of an object that pretends to be a module.
    return [module for module in found.values() if issubclass(type(module), ModuleType)]


def modules_imported_by(module: ModuleType) -> list[ModuleType]:
    """The module, those whose import began after its own, and those whose import goes on.

    No other can refer to a function that was defined when the module was executed just now.
    """
    modules = loaded_modules()
    identities = [id(other) for other in modules]
    first = identities.index(id(module)) if id(module) in identities else 0
    older = [other for other in modules[:first] if _is_initializing(other)]
    return [*older, *modules[first:]]


def find_aliases(functions: Collection[Any], modules: Collection[ModuleType]) -> list[Place]:
    """Find the global variables of modules that are one of some functions.

    Args:
        functions: The functions. An idle wrapper of ours counts as the function in it.
        modules: Where to look.
    """
    wanted = {id(function) for function in functions}
    return [
        Place(module, name, value)
        for module in modules
        for name, value in list(namespace_of(module).items())
        if id(without_idle_wrappers(value)) in wanted
    ]


def are_held(functions: Sequence[Any]) -> bool:
    """Whether anything but the namespace of a module refers to one of some functions.

    One pass over the objects of the process answers it, a tenth of what looking for the variables
    takes; there is none where it is False.

    Args:
        functions: The functions. An idle wrapper of ours counts as the function in it.
    """
    namespaces = {id(namespace_of(module)) for module in loaded_modules()}
    targets = functions
    while targets:
        referrers = [
            referrer
            for referrer in gc.get_referrers(*targets)
            if referrer is not targets and id(referrer) not in namespaces
        ]
        if any(type(referrer) in _CONTAINERS for referrer in referrers):
            return True
        # Descriptors and idle wrappers stand for the function in them: what refers to those?
        targets = [
            referrer
            for referrer in referrers
            if type(referrer) in _DESCRIPTORS
            or (type(referrer) in WRAPPERS and not referrer.is_in_force)
        ]
        del referrers  # It would refer to them.
    return False


def find_holders(functions: Collection[Any], modules: Collection[ModuleType]) -> list[Holder]:
    """Find the global variables of modules that hold one of some functions.

    Functions hold what is in their defaults and closures, classes what is in the attributes that
    they define in their module; the rest are partials, caches and built-in containers.

    Args:
        functions: The functions. An idle wrapper of ours counts as the function in it.
        modules: Where to look.
    """
    wanted = {id(function): function for function in functions}
    return [
        Holder(wanted[key], str(namespace_of(module).get("__name__")), variable)
        for module in modules
        for variable, value in _variables(module)
        for key in _held(value, wanted.keys(), _DEPTH)
    ]


def _variables(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The variables of a module that may hold a function, and the attributes of its classes."""
    namespace = namespace_of(module)
    for name, value in list(namespace.items()):
        if type(value) in _READERS:
            yield name, value
        elif issubclass(type(value), type):
            attributes = _namespace_of_class(value).copy()
            if attributes.get("__module__") == namespace.get("__name__"):
                for key, item in attributes.items():
                    # In a tuple, which holds the attribute: that may be the function itself.
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

_DESCRIPTORS = {staticmethod, classmethod}

_CONTAINERS = {CellType, *_READERS} - _DESCRIPTORS
"""The types of the objects that are looked into, and of the cells of closures."""


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(namespace_of(module).get("__spec__"), "_initializing", False))
