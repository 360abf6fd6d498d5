"""The flag in a config's JSON, and in that of a compiled model.

NxDI writes ``neuron_config.json`` beside a compiled model (``InferenceConfig.save``). What is
loaded from there runs as it was compiled, whatever is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.settings.settings import FLAG

COMPILED_CONFIG = "neuron_config.json"


def is_on_in(text: str) -> bool:
    """Whether the flag is on in a config's JSON."""
    return _is_on(json.loads(text).get("neuron_config"))


def check_compiled_config(folder: Path, asked: Mapping[str, Any], *, compiled_wins: bool) -> None:
    """Make sure that a model was compiled with the flag that is asked for.

    Args:
        folder: Where it was compiled to. Nothing is said of one without a config.
        asked: The config that is asked for, in the form of its JSON.
        compiled_wins: Whether the compiled model runs with the config that it was compiled with,
            rather than with the one that is asked for.

    Raises:
        ConfigurationError: It was not; the message names the folder.
    """
    file = folder / COMPILED_CONFIG
    if not file.is_file():
        return
    compiled = dict(_neuron_configs(json.loads(file.read_text(encoding="utf-8"))))
    for model, neuron_config in _neuron_configs(asked):
        if model not in compiled or not neuron_config.get("quantized"):
            continue
        wanted, found = _is_on(neuron_config), _is_on(compiled[model])
        if wanted and not found:
            raise ConfigurationError(
                f"{file}: {model} was compiled without {FLAG}, and {FLAG}=True is asked for; "
                "compile it into another folder (NEURON_COMPILED_ARTIFACTS for vLLM-Neuron, "
                "--compiled-model-path for inference_demo), or remove this one"
            )
        if found and not wanted and not compiled_wins:
            raise ConfigurationError(
                f"{file}: {model} was compiled with {FLAG}=True, and it is not asked for; set "
                f"{FLAG}=True, or compile it into another folder"
            )


def _is_on(neuron_config: Any) -> bool:
    return isinstance(neuron_config, Mapping) and neuron_config.get(FLAG) is True


def _neuron_configs(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The neuron configs of the models in a config: the model, and its draft if it has one.

    Of a model that also sees, that of the language model.
    """
    language = config.get("text_config")
    holders = {"the model": language if isinstance(language, Mapping) else config}
    speculation = config.get("fused_spec_config")
    if isinstance(speculation, Mapping):
        holders["the draft"] = speculation.get("draft_config") or {}
    for name, holder in holders.items():
        neuron_config = holder.get("neuron_config")
        if isinstance(neuron_config, Mapping):
            yield name, neuron_config
