"""What a function's code refers to, read from its bytecode."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType
from typing import Any


def refers_to(function: Any, name: str) -> bool:
    """Whether a function's own code uses a name; see :func:`names_in_code`."""
    return name in names_in_code(function)


def names_in_code(function: Any) -> frozenset[str]:
    """Names in a function's own code: variables, attributes, parameters and string constants.

    Nested functions count. Wrappers around it are looked through. A text of several words, such
    as a docstring, names nothing.
    """
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return frozenset(_names_in(code) if isinstance(code, CodeType) else ())


def _names_in(code: CodeType) -> Iterator[str]:
    yield from (*code.co_names, *code.co_varnames)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
        elif isinstance(constant, str) and not any(letter.isspace() for letter in constant):
            yield constant
