"""The scales of the layers beside the experts, brought to the form that NxDI loads.

NxDI's layers of ``per_channel_symmetric`` have scales ``[out, 1]``; a checkpoint may have
``[out]``, or one number for a whole tensor, which NxDI fails on (``modules/attention/gqa.py``, and
``trace/trace.py`` of NxD).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.loading.names import scale_of
from nxdi_expertscale.numerics import fp8, scales


def per_channel_scales(
    state_dict: Mapping[str, torch.Tensor], family: MoEFamily
) -> dict[str, torch.Tensor]:
    """The scales that have another form than ``[out, 1]``, in that form; exact.

    Args:
        state_dict: A checkpoint's tensors, before NxDI fuses them.
        family: The names in it.

    Returns:
        Scales ``[out, 1]``, ``torch.float32``, by their names.

    Raises:
        CheckpointError: A scale has a shape that does not fit its weight.
    """
    found = {}
    for key, weight in state_dict.items():
        if not key.endswith(".weight") or weight.dim() != 2 or not fp8.is_quantized(weight):
            continue
        scale = state_dict.get(scale_of(key))
        if scale is None or tuple(scale.shape) == (weight.shape[0], 1):
            continue
        if family.names.is_router_key(key) or family.names.parse_expert_key(key) is not None:
            continue
        try:
            found[scale_of(key)] = scales.channel_scale(scale, weight.shape[0]).T.contiguous()
        except ValueError as error:
            raise CheckpointError(
                f"{scale_of(key)}: {error}; make the checkpoint again with 'nxdi-expertscale "
                "quantize'"
            ) from error
    return found
