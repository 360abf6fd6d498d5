"""Reads a field of a model's config, whichever name its family has for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def first_int(config: Any, names: Iterable[str]) -> int | None:
    """The first of some fields of a config that is an integer.

    Args:
        config: The fields of a ``config.json``, or an object with them as attributes, as NxDI's
            ``InferenceConfig``.
        names: The fields, the preferred one first.
    """
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
