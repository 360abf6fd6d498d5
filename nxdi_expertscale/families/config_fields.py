"""Reads a model's config, whichever names its family has for a field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a ``config.json`` that describes the language model.

    Hugging Face's models that also see keep it in ``text_config``.
    """
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that the embeddings are the output layer's weight too."""
    parts = (config, language_config(config))
    return any(part.get("tie_word_embeddings") is True for part in parts)


def first_int(config: Any, names: Iterable[str]) -> int | None:
    """The first of some fields of a config that is an integer.

    Args:
        config: What ``config.json`` holds, or an object with its fields as attributes.
        names: The fields, the preferred one first.
    """
    if isinstance(config, Mapping):
        config = language_config(config)
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
