"""The seam ``vllm_neuron.worker.neuronx_distributed_model_loader``: compiled artifacts are loaded.

``NEURON_COMPILED_ARTIFACTS`` names a folder whose config wins over the one that vLLM-Neuron is
given, so that here alone both are known. Releases 0.2.0 to 0.5.0 have the same function.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import seams
from nxdi_expertscale.settings.compiled_config import check_compiled_config

MODULE = "vllm_neuron.worker.neuronx_distributed_model_loader"

_PARAMETERS = ["compiled_model_path", "neuronx_model_cls", "kwargs"]


def patches() -> list[Patch]:
    """The check of the artifacts' config, before they are loaded."""
    return [
        Patch(
            seam=seams.COMPILED_ARTIFACTS,
            module=MODULE,
            attribute="NeuronModelBase._load_compiled_model",
            wrapper=_check_artifacts,
            find_incompatibility=_incompatibility,
        )
    ]


def _incompatibility(module: ModuleType) -> str | None:
    function = module.NeuronModelBase._load_compiled_model
    found = list(inspect.signature(function).parameters)[1:]
    return None if found == _PARAMETERS else f"_load_compiled_model is called with {found}"


def _check_artifacts(
    wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    folder, _model_cls, given = inspect.signature(wrapped).bind(*args, **kwargs).args
    # Of a model that also sees, vLLM-Neuron has made the config already.
    config = given.get("config")
    whole = None if config is None else json.loads(config.to_json_string())
    asked = whole or {"neuron_config": given.get("neuron_config")}
    check_compiled_config(Path(folder), asked, compiled_wins=True)
    return wrapped(*args, **kwargs)
