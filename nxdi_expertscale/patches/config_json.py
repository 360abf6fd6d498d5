"""NxDI's ``InferenceConfig`` as JSON and back: the flag has to come through."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import config, seams
from nxdi_expertscale.settings.compiled_config import is_on_in
from nxdi_expertscale.settings.settings import FLAG, read_settings


def patches() -> list[Patch]:
    """The checks of what is written and of what is read."""
    return [
        Patch(
            seam=seams.CONFIG_TO_JSON,
            module=config.MODULE,
            attribute="InferenceConfig.to_json_string",
            wrapper=_check_written,
        ),
        Patch(
            seam=seams.CONFIG_FROM_JSON,
            module=config.MODULE,
            attribute="InferenceConfig.from_json_string",
            wrapper=_check_read,
        ),
    ]


def _check_written(
    wrapped: Callable[..., str], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    text = wrapped(*args, **kwargs)
    settings = read_settings(getattr(instance, "neuron_config", None))
    if settings.is_on and not is_on_in(text):
        raise IncompatibleUpstreamError(
            f"seam {seams.CONFIG_TO_JSON!r}: InferenceConfig.to_json_string left {FLAG}=True out; "
            "a compiled model would be loaded without it"
        )
    return text


def _check_read(
    wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    found = wrapped(*args, **kwargs)
    text = inspect.signature(wrapped).bind(*args, **kwargs).args[0]
    is_lost = is_on_in(text) and "neuron_config" not in kwargs
    if is_lost and not read_settings(getattr(found, "neuron_config", None)).is_on:
        raise IncompatibleUpstreamError(
            f"seam {seams.CONFIG_FROM_JSON!r}: InferenceConfig.from_json_string left {FLAG}=true "
            "out of what it read"
        )
    return found
