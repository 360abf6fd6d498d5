"""The seam ``neuronx_distributed_inference.models.application_base``: the checkpoint, made once.

vLLM-Neuron and inference_demo have NxDI quantize the model on every compile, all of it in memory
and over whatever is at ``quantized_checkpoints_path``. A finished folder of ours is used there,
whatever the flag, and never written over. With the flag on, one that is not there is made as
``nxdi-expertscale quantize`` makes it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import seams
from nxdi_expertscale.patches.exclusions import exclusions_for_upstream
from nxdi_expertscale.patches.installed_release import checked_settings
from nxdi_expertscale.settings.compiled_config import check_compiled_config
from nxdi_expertscale.settings.settings import FLAG

MODULE = "neuronx_distributed_inference.models.application_base"


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The folder that is made once, the check of a compiled model, and tied embeddings."""
    return [
        Patch(
            seam=seams.SAVE_QUANTIZED,
            module=MODULE,
            attribute="NeuronApplicationBase.save_quantized_state_dict",
            wrapper=_saving(families),
            find_incompatibility=_incompatibility,
        ),
        Patch(
            seam=seams.LOAD_COMPILED,
            module=MODULE,
            attribute="NeuronApplicationBase.load",
            wrapper=_check_compiled,
        ),
        Patch(
            seam=seams.TIED_EMBEDDINGS,
            module=MODULE,
            attribute="NeuronApplicationBase.update_state_dict_for_tied_weights",
            wrapper=_tying(families),
        ),
    ]


def _incompatibility(module: ModuleType) -> str | None:
    save = module.NeuronApplicationBase.save_quantized_state_dict
    try:
        inspect.signature(save).bind("model_path", None)
    except TypeError as error:
        return f"save_quantized_state_dict is not called with (path, config): {error}"
    if not refers_to(save, "quantized_checkpoints_path"):
        return "save_quantized_state_dict does not write to quantized_checkpoints_path"
    return None


def _saving(families: Sequence[MoEFamily]) -> Callable[..., Any]:
    def save_quantized_state_dict(
        wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        model_path, config = inspect.signature(wrapped).bind(*args, **kwargs).args
        settings = checked_settings(config, families)
        if settings.is_quantized and settings.quantized_checkpoints_path:
            from nxdi_expertscale.checkpoint import finished, provide

            source, folder = Path(model_path), Path(settings.quantized_checkpoints_path)
            obstacle = provide.find_obstacle(source, settings.quantization_dtype, settings.family)
            if obstacle is None and (settings.is_on or finished.is_finished(folder)):
                provide.provide_checkpoint(source, folder, settings.exclusions)
                return None
            if settings.is_on:
                provide.prepare_for_upstream(source, folder, str(obstacle))
            else:
                provide.check_not_overwritten(source, folder, obstacle or f"{FLAG} is off")
        with exclusions_for_upstream(config.neuron_config, settings.expanded_exclusions):
            return wrapped(*args, **kwargs)

    return save_quantized_state_dict


def _check_compiled(
    wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    folder = inspect.signature(wrapped).bind(*args, **kwargs).args[0]
    asked = json.loads(instance.config.to_json_string())
    check_compiled_config(Path(folder), asked, compiled_wins=False)
    return wrapped(*args, **kwargs)


def _tying(families: Sequence[MoEFamily]) -> Callable[..., Any]:
    def update_state_dict_for_tied_weights(
        wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from nxdi_expertscale.loading.tied_embeddings import is_of_families, tie_embeddings

        # The base class only raises; a model that knows tied embeddings has its own.
        state_dict = inspect.signature(wrapped).bind(*args, **kwargs).args[0]
        if not is_of_families(state_dict, families):
            return wrapped(*args, **kwargs)
        tie_embeddings(state_dict)
        return None

    return update_state_dict_for_tied_weights
