"""Reads a model's config, whichever names its family has for a field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def config_field(config: Any, name: str, default: Any = None) -> Any:
    """A field of the config of a language model.

    Args:
        config: What ``config.json`` holds, or an object with its fields as attributes. Hugging
            Face's models that also see keep those of their language model in ``text_config``.
        name: The field.
        default: What to give where it is absent.
    """
    if not isinstance(config, Mapping):
        return getattr(config, name, default)
    nested = config.get("text_config")
    return (nested if isinstance(nested, Mapping) else config).get(name, default)


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
