"""One line in the log that says what a model is loaded with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, read_manifest
from nxdi_expertscale.errors import CheckpointError

if TYPE_CHECKING:
    from nxdi_expertscale.loading.expert_scales import LayerScales

_logger = logging.getLogger("nxdi_expertscale")


def report_experts(layers: Sequence[LayerScales], folder: str | None, *, expert_wise: bool) -> None:
    """Log how many experts have which scales, and from which folder.

    Nothing is logged of tensors without values, which are only checked.

    Args:
        layers: The layers whose experts are quantized.
        folder: The FP8 checkpoint, NxDI's ``quantized_checkpoints_path``, if it names one.
        expert_wise: Whether each expert has its own scales, ``[E, 1, dim]``, or all experts of a
            layer share their mean, ``[1, 1, dim]``.
    """
    if not layers or folder is None:
        return
    scale = next(iter(layers[0].fused.values()))
    if scale.is_meta:
        return
    experts = scale.shape[0]
    _logger.info(
        "loaded %d layers of %d FP8 experts with %s, from %s (%s)",
        len(layers),
        experts,
        f"{experts} scales per channel, one for each expert (expert_wise_scale is on)"
        if expert_wise
        else "1 scale per channel, the mean of all experts (expert_wise_scale is off)",
        folder,
        _describe_contents(folder),
    )


def _describe_contents(folder: str) -> str:
    try:
        return f"digest {read_manifest(folder).digest[:16]}"
    except CheckpointError:
        return f"no {MANIFEST}, so not known"
