"""Whether NxDI could run a finished checkpoint with some settings, judged without NxDI."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.settings import rules
from nxdi_expertscale.settings.settings import Settings, read_settings

SEQ_LEN = 128
"""NxDI's own, where a config names none (``models/config.py``)."""


class MoENeuronConfig(SimpleNamespace):
    """Stands for NxDI's class of this name, which need not be installed."""


def settings_of(model: Model, neuron_config: Mapping[str, Any]) -> Settings:
    """What NxDI's two configs would ask for.

    Args:
        model: The finished checkpoint.
        neuron_config: Keywords of ``MoENeuronConfig``.
    """
    raw = model.config.raw
    nested = raw.get("text_config")
    fields = {**(nested if isinstance(nested, Mapping) else raw)}
    fields["model_type"] = model.config.model_type
    return read_settings(
        MoENeuronConfig(**{"seq_len": SEQ_LEN, **neuron_config}),
        SimpleNamespace(**fields),
        family=model.family,
    )


def check_serving(model: Model, neuron_config: Mapping[str, Any]) -> None:
    """Refuse, or warn of, what a config is refused for when it is made, by the same rules.

    Args:
        model: The finished checkpoint.
        neuron_config: Keywords of ``MoENeuronConfig``.

    Raises:
        ConfigurationError: It could not; the message says what to write instead.
    """
    settings = settings_of(model, neuron_config)
    rules.check(settings)
    rules.warn(settings)
