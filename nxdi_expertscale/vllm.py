"""What vLLM calls in every process that it starts, by the entry point ``vllm.general_plugins``."""

from __future__ import annotations

import logging

from nxdi_expertscale import activation

_logger = logging.getLogger("nxdi_expertscale")


def activate() -> None:
    """Activate the plugins that ``NXDI_PLUGINS`` allows.

    vLLM calls it more than once, and an exception here would end it: a failure is logged.
    """
    _log_as_vllm_does()
    try:
        activation.activate()
    except Exception:
        _logger.exception("activation failed; expert_wise_scale is not available")


def _log_as_vllm_does() -> None:
    """Show this package's lines where vLLM shows its own.

    vLLM configures the logger ``vllm`` alone (vllm/logger.py), so that an INFO of another package
    is lost. Where a program has configured ours, or keeps vLLM from configuring its own, nothing
    is changed.
    """
    vllm = logging.getLogger("vllm")
    if not vllm.handlers or _logger.handlers:
        return
    for handler in vllm.handlers:
        _logger.addHandler(handler)
    _logger.setLevel(vllm.level)
    _logger.propagate = vllm.propagate
