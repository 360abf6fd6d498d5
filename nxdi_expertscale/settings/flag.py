"""Shortcuts to :mod:`settings.settings`, until every patch reads a ``Settings`` itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.settings import rules
from nxdi_expertscale.settings.settings import EXPERT_WISE, PER_CHANNEL, read_settings
from nxdi_expertscale.settings.settings import FLAG as NAME

__all__ = ["EXPERT_WISE", "NAME", "PER_CHANNEL"]


def is_on(neuron_config: Any) -> bool:
    """See :attr:`Settings.is_on`."""
    return read_settings(neuron_config).is_on


def is_quantized(neuron_config: Any) -> bool:
    """See :attr:`Settings.is_quantized`."""
    return read_settings(neuron_config).is_quantized


def fuses_expert_wise(neuron_config: Any) -> bool:
    """See :attr:`Settings.keeps_scales_apart`."""
    return read_settings(neuron_config).keeps_scales_apart


def exclusions(neuron_config: Any) -> tuple[str, ...]:
    """See :attr:`Settings.exclusions`."""
    return read_settings(neuron_config).exclusions


def check_neuron_config(neuron_config: Any) -> None:
    """See :func:`rules.check`."""
    rules.check(read_settings(neuron_config))


def family_of_model(model_config: Any, families: Sequence[MoEFamily]) -> MoEFamily | None:
    """See :attr:`Settings.family`."""
    return read_settings(None, model_config, families).family
