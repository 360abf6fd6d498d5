"""The seam ``neuronx_distributed.trace.trace``: a state dict meets the model that it is for.

Whichever way the weights take to the device (cut when they are loaded, cut beforehand and saved, or
loaded into modules on a CPU), NxD's ``preprocess_checkpoint`` calls ``invoke_preshard_hook`` once
with the whole model and the whole state dict, and then drops the tensors that the model does not
have. Between the two, every tensor has the name of the parameter that takes it, nothing is cut yet,
and nothing is lost yet.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import seams
from nxdi_expertscale.patches.decoder_model_instance import models_in, states_of
from nxdi_expertscale.settings.settings import Settings, read_settings

if TYPE_CHECKING:
    import torch

MODULE = "neuronx_distributed.trace.trace"

_logger = logging.getLogger("nxdi_expertscale")


class CheckedWithoutValues(Exception):  # noqa: N818
    """A state dict without values fills its model; there is nothing to go on with."""


def patches() -> list[Patch]:
    """The check of a model against its state dict, after the preshard hooks."""
    return [
        Patch(
            seam=seams.PRESHARD,
            module=MODULE,
            attribute="invoke_preshard_hook",
            wrapper=_invoke_preshard_hook,
            find_incompatibility=_find_incompatibility,
        )
    ]


def _find_incompatibility(module: ModuleType) -> str | None:
    try:
        inspect.signature(module.invoke_preshard_hook).bind(None, {}, "")
    except TypeError as error:
        return f"invoke_preshard_hook is not called with (model, state dict, prefix): {error}"
    if not refers_to(module.preprocess_checkpoint, "invoke_preshard_hook"):
        return "preprocess_checkpoint does not call invoke_preshard_hook"
    return None


def _invoke_preshard_hook(
    wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    model, state_dict, prefix = _bind(*args, **kwargs)
    # It calls itself for each module, with the module's path as prefix.
    settings = [] if prefix or model is None else _settings_of(model)
    if not any(part.is_quantized for part in settings):
        return wrapped(*args, **kwargs)
    is_on = any(part.is_on for part in settings)
    has_values = not any(tensor.is_meta for tensor in state_dict.values())
    try:
        with nullcontext() if has_values else _on_meta():
            result = wrapped(*args, **kwargs)
    except KeyError as error:
        missing = error.args[0] if error.args else error
        if not is_on or missing in state_dict:
            raise
        raise CheckpointError(
            f"{missing}: missing; {type(model).__name__} cannot be loaded without it: make or "
            "download the checkpoint again"
        ) from error
    if is_on:
        from nxdi_expertscale.loading.plain_linears import dequantize_plain_linears

        dequantize_plain_linears(model, state_dict)
    _check_filled(model, state_dict, is_on=is_on)
    if not has_values:
        raise CheckedWithoutValues
    return result


def _bind(module: Any, checkpoint: Any, prefix: str) -> tuple[Any, dict[str, torch.Tensor], str]:
    """The arguments, whether they are given by position or by upstream's names."""
    return module, checkpoint, prefix


def _on_meta() -> AbstractContextManager[Any]:
    """Let the hooks make what they add, such as padding, without values too."""
    import torch

    return torch.device("meta")


def _settings_of(model: Any) -> list[Settings]:
    """What a model is loaded with, or a draft and its target."""
    configs = [getattr(part, "config", None) for part in models_in(model)]
    return [read_settings(getattr(config, "neuron_config", None)) for config in configs]


def _check_filled(model: Any, state_dict: dict[str, torch.Tensor], *, is_on: bool) -> None:
    """Refuse a state dict that does not fill the model; without the flag, warn of it.

    Raises:
        CheckpointError: The flag is on, and a tensor reaches no parameter, or a parameter no
            tensor.
    """
    from nxdi_expertscale.loading import completeness

    faults = completeness.find_faults(model, state_dict, states_of(model))
    if not faults:
        return
    message = completeness.describe(faults)
    if is_on:
        raise CheckpointError(message)
    _logger.warning("the model may answer nonsense: %s", message)
