"""Routers that a checkpoint has quantized, made numbers again: NxDI loads no scale for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping

import torch

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.loading.names import scale_of
from nxdi_expertscale.numerics import fp8, scales

_logger = logging.getLogger("nxdi_expertscale")


def dequantized_routers(
    state_dict: Mapping[str, torch.Tensor],
    family: MoEFamily,
    num_layers: int,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Compute the values of the routers that are quantized. The state dict stays as it is.

    Args:
        state_dict: A checkpoint's tensors, before NxDI fuses them.
        family: The names in it.
        num_layers: Number of decoder layers.
        dtype: The result's.

    Returns:
        The routers' weights ``[E, H]`` by their names; empty where none is quantized.

    Raises:
        CheckpointError: A router's scale is missing, or has another shape than ``[E, 1]``,
            ``[E]`` or one number.
    """
    routers = {}
    for layer in range(num_layers):
        key = family.router_key(layer)
        weight = state_dict.get(key)
        if weight is None or not fp8.is_quantized(weight):
            continue
        scale = state_dict.get(scale_of(key))
        if scale is None:
            raise CheckpointError(
                f"{scale_of(key)}: missing, and the router's weight is {weight.dtype}; make "
                "the checkpoint again with 'nxdi-expertscale quantize'"
            )
        try:
            per_channel = scales.channel_scale(scale, weight.shape[0])
        except ValueError as error:
            raise CheckpointError(f"{scale_of(key)}: {error}") from error
        routers[key] = fp8.dequantize(weight, per_channel.T).to(dtype)
    return routers


def replace_routers(
    state_dict: MutableMapping[str, torch.Tensor], routers: Mapping[str, torch.Tensor]
) -> None:
    """Put dequantized routers in the place of the quantized ones, and take their scales out."""
    for key, weight in routers.items():
        state_dict[key] = weight
        del state_dict[scale_of(key)]
    if routers:
        _logger.warning(
            "%d routers are quantized in the checkpoint and were dequantized; quantize it with "
            "'nxdi-expertscale quantize', which leaves routers as they are",
            len(routers),
        )
