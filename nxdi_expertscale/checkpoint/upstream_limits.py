"""Warnings of what NxDI itself gets wrong of a checkpoint's model."""

from __future__ import annotations

import logging

from nxdi_expertscale.checkpoint.read.model import Model

_logger = logging.getLogger("nxdi_expertscale")


def warn_of_limits(model: Model, seq_len: int | None = None) -> None:
    """Warn of each limit of NxDI that a model reaches; with the flag on NxDI refuses most of them.

    Args:
        model: The checkpoint.
        seq_len: Tokens of the longest sequence; None where any length counts.
    """
    for limit in model.family.limits_of(model.config.raw):
        if seq_len is None or limit.starts_at <= seq_len:
            _logger.warning("%s: %s; %s", model.config.where, limit.problem, limit.remedy)
