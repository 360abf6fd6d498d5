"""The sizes that a model's ``config.json`` has to hold, checked before anything is as large."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nxdi_expertscale.errors import CheckpointError

MAX_LAYERS = 1 << 16
"""More layers, and more experts in each, than any model has."""


def layers_in(config: Mapping[str, Any], where: Path | str) -> int:
    """The number of layers that a model's config has to hold.

    Raises:
        CheckpointError: It does not, or it is more than any model has.
    """
    layers = size_in(config, "num_hidden_layers", where)
    if layers > MAX_LAYERS:
        raise CheckpointError(
            f"{where}: num_hidden_layers is {layers}, more than any model has; download it again"
        )
    return layers


def size_in(
    config: Mapping[str, Any], name: str, where: Path | str, *, default: int | None = None
) -> int:
    """A size that a model's config has to hold, or may leave out where there is a default.

    Raises:
        CheckpointError: It does not, or it is no size.
    """
    value = config.get(name)
    if not value and default is not None:
        value = default
    if type(value) is not int or not 0 < value < 1 << 31:
        raise CheckpointError(f"{where}: {name} is {value!r}, not a size; download it again")
    return value
