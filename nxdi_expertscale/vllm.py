"""What vLLM calls in every process that it starts, by the entry point ``vllm.general_plugins``."""

from __future__ import annotations

import logging

from nxdi_expertscale.activation import activate as _activate

_logger = logging.getLogger("nxdi_expertscale")


def activate() -> None:
    """Activate the plugins that ``NXDI_PLUGINS`` allows.

    vLLM calls it more than once, and an exception here would end it: a failure is logged.
    """
    try:
        _activate()
    except Exception:
        _logger.exception("activation failed; expert_wise_scale is not available")
