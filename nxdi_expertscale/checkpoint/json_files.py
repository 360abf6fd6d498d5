"""JSON files that may come from anyone, and those that are written."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from nxdi_expertscale.errors import damaged
from nxdi_expertscale.sources.source import Source

MAX_JSON_BYTES = 32 << 20
"""Longer than any real config or index."""

MAX_DEPTH = 64
"""Levels of JSON that are read: fewer than what any of Python's JSON functions can take."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(folder: Source, name: str) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: The file is missing, too long, or not a JSON object.
    """
    return parse_json(folder.read(name, limit=MAX_JSON_BYTES), folder.location(name))


def parse_any_json(text: bytes, where: str) -> Any:
    """Parse JSON of some kind, that is copied and not read.

    Args:
        text: The JSON, in any encoding that JSON may have.
        where: What messages call it.

    Raises:
        CheckpointError: It is not JSON, or is nested too deeply.
    """
    try:
        value = json.loads(text)
        _check_depth(value)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"is not valid JSON ({error})") from None
    return value


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    What it gives can be written again, as JSON and as UTF-8.

    Args:
        text: The object, in UTF-8.
        where: What messages call it.

    Raises:
        CheckpointError: It is not JSON, not an object, has a name twice, is nested too deeply,
            or holds halves of characters, or NaN or infinity, which are not JSON.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        _check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise damaged(where, "is not a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{duplicate!r} occurs twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:32]} is too large a number")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for whole in level
            if isinstance(whole, (dict, list))
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
        if not level:
            return
    raise ValueError(f"it has more than {MAX_DEPTH} levels")


def render_json(value: Mapping[str, Any]) -> bytes:
    """A JSON object as the bytes of a file that people may read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
