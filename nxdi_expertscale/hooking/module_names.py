"""Names of modules that a patch may be for: one module, or a file in whatever package.

NxDI's users copy a contributed model's files into packages of their own, so ``*.modeling_olmoe``
stands for ``modeling_olmoe``, ``olmoe.modeling_olmoe``, ``src.modeling_olmoe`` and so on.
"""

from __future__ import annotations

import os
from types import ModuleType

from nxdi_expertscale.hooking.wrapper import namespace_of

ANY_PACKAGE = "*."
"""What stands before the name of a file that may be in any package."""


def is_in_any_package(name: str) -> bool:
    """Whether a patch's module is a file in whatever package, and no module's full name."""
    return name.startswith(ANY_PACKAGE)


def ending_of(name: str) -> str:
    """What the full name of a module, with a dot before it, ends with.

    Args:
        name: A patch's name of a file in whatever package.
    """
    return name.removeprefix("*")


def matches_name(name: str, module: str) -> bool:
    """Whether a module's full name is the one of a patch.

    Args:
        name: The patch's: a full name, or ``*.`` and the end of one.
        module: The module's.
    """
    if not is_in_any_package(name):
        return module == name
    return f".{module}".endswith(ending_of(name))


def matches_module(name: str, module: ModuleType) -> bool:
    """Whether a loaded module, or the file that it was executed from, has the name of a patch.

    A file that was loaded by its path may have been given any name: ``__main__``, for one.
    """
    namespace = namespace_of(module)
    file = namespace.get("__file__")
    if matches_name(name, str(namespace.get("__name__"))):
        return True
    if not is_in_any_package(name) or not isinstance(file, str):
        return False
    path, _ = os.path.splitext(file)  # noqa: PTH122 (a path is slow, and every module is asked)
    return matches_name(name, path.replace(os.sep, "."))
