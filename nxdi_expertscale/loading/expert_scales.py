"""The experts' scales of one layer: taken out of a state dict, checked, ready to be fused.

A state dict here has the names that NxDI gives it before it fuses the experts: without Hugging
Face's ``model.``, and with ``.scale`` for ``.weight_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.numerics import fp8, scales

StateDict = Mapping[str, torch.Tensor]

_COMPARED_INPUTS = 64

_MAKE_IT_AGAIN = "make the checkpoint again with 'nxdi-expertscale quantize'"


@dataclass(frozen=True)
class LayerScales:
    """The scales of one layer's experts.

    Attributes:
        layer: The layer's number.
        fused: For each of NxDI's fused weights, ``[E, 1, dim]``, ``torch.float32``: gate then up
            along the last axis for ``gate_up_proj``, unpadded.
        consumed: Names of the tensors that the scales were read from.
        compared: For each of NxDI's fused weights, what it is made of for the first and for the
            last expert: by the expert's number, the weights ``[out, in]`` of its projections.
    """

    layer: int
    fused: Mapping[str, torch.Tensor]
    consumed: tuple[str, ...]
    compared: Mapping[str, Mapping[int, Sequence[torch.Tensor]]]

    def matches_layout(self, fused: str, weight: torch.Tensor) -> bool:
        """Whether a fused weight has its channels where the scales have them.

        Args:
            fused: A key of :attr:`fused`.
            weight: What NxDI made of the experts' weights, ``[E, in, dim]``, padded or not.
        """
        return all(_holds(weight[expert], parts) for expert, parts in self.compared[fused].items())


def collect(
    state_dict: StateDict, family: MoEFamily, layer: int, experts: int, *, check_range: bool
) -> LayerScales | None:
    """Collect and check the scales of a layer's experts. The state dict stays as it is.

    Args:
        state_dict: A checkpoint's tensors, before NxDI fuses them.
        family: The names in it.
        layer: The layer's number.
        experts: Number of experts in a layer, by the model's config.
        check_range: Whether to look at every FP8 weight for values beyond Neuron's range.

    Returns:
        None where no expert of the layer has a scale: the layer is in full precision.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype than it should, a scale
            is not finite and positive, or an FP8 weight goes beyond ±240.
    """
    if not _has_scale(state_dict, family, layer, experts):
        _refuse_quantized_without_scale(state_dict, family, layer, experts)
        return None
    _check_weights(state_dict, family, layer, experts, check_range=check_range)
    fused: dict[str, torch.Tensor] = {}
    consumed: list[str] = []
    compared: dict[str, dict[int, list[torch.Tensor]]] = {}
    for name, projections in family.fused.items():
        stacked = [_stack(state_dict, family, layer, experts, part) for part in projections]
        fused[name] = scales.fuse(stacked)
        consumed += [
            family.expert_key(layer, expert, part, "scale")
            for part in projections
            for expert in range(experts)
        ]
        compared[name] = {
            expert: [state_dict[family.expert_key(layer, expert, part)] for part in projections]
            for expert in (0, experts - 1)
        }
    return LayerScales(layer, fused, tuple(consumed), compared)


def _holds(fused: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Whether ``[in, dim]`` has these weights ``[out, in]``, transposed, side by side.

    Every channel is looked at, at some of its inputs: scales belong to channels, and no two are
    alike there.
    """
    inputs = parts[0].shape[1]
    if fused.dtype != parts[0].dtype or fused.shape[1] % len(parts) or fused.shape[0] < inputs:
        return False
    step = max(1, inputs // _COMPARED_INPUTS)
    places = fused.view(torch.uint8)[:inputs:step].tensor_split(len(parts), dim=1)
    return all(
        torch.equal(place[:, : part.shape[0]], part.view(torch.uint8)[:, ::step].T)
        for place, part in zip(places, parts, strict=True)
    )


def _has_scale(state_dict: StateDict, family: MoEFamily, layer: int, experts: int) -> bool:
    return any(
        family.expert_key(layer, expert, projection, "scale") in state_dict
        for projection in family.projections
        for expert in range(experts)
    )


def _refuse_quantized_without_scale(
    state_dict: StateDict, family: MoEFamily, layer: int, experts: int
) -> None:
    for projection in family.projections:
        for expert in range(experts):
            key = family.expert_key(layer, expert, projection)
            weight = state_dict.get(key)
            if weight is None or not fp8.is_quantized(weight):
                continue
            if f"{key}_scale_inv" in state_dict:
                raise CheckpointError(
                    f"{key}_scale_inv: a checkpoint with block scales cannot be loaded with "
                    f"quantized=True; {_MAKE_IT_AGAIN}"
                )
            raise CheckpointError(
                f"{family.expert_key(layer, expert, projection, 'scale')}: missing, and the "
                f"weight is {weight.dtype}; {_MAKE_IT_AGAIN}"
            )


def _check_weights(
    state_dict: StateDict, family: MoEFamily, layer: int, experts: int, *, check_range: bool
) -> None:
    beyond = family.expert_key(layer, experts, family.gate)
    if beyond in state_dict:
        raise CheckpointError(
            f"{beyond}: the model's config says {experts} experts, the checkpoint has more"
        )
    first = _get(state_dict, family.expert_key(layer, 0, family.gate))
    for projection in family.projections:
        shape = tuple(first.shape) if projection != family.down else tuple(first.shape)[::-1]
        for expert in range(experts):
            key = family.expert_key(layer, expert, projection)
            weight = _get(state_dict, key)
            # Upstream fuses all of a layer into tensors of the first weight's dtype: another one
            # would be cast without its scale.
            if weight.dtype != first.dtype:
                raise CheckpointError(
                    f"{key}: its dtype is {weight.dtype}, that of the layer's other experts "
                    f"{first.dtype}; a layer's experts are quantized all or none: "
                    f"{_MAKE_IT_AGAIN}"
                )
            if tuple(weight.shape) != shape:
                raise CheckpointError(
                    f"{key}: its shape is {list(weight.shape)}, the layer's other experts say "
                    f"{list(shape)}; {_MAKE_IT_AGAIN}"
                )
            if check_range and weight.dtype == torch.float8_e4m3fn and fp8.exceeds_range(weight):
                raise CheckpointError(
                    f"{key}: holds FP8 values beyond ±240, which Neuron reads as infinity or "
                    f"NaN (a checkpoint made for GPUs); {_MAKE_IT_AGAIN}"
                )


def _stack(
    state_dict: StateDict, family: MoEFamily, layer: int, experts: int, projection: str
) -> torch.Tensor:
    """The scales of one projection, ``[E, 1, out]``."""
    parts = []
    for expert in range(experts):
        key = family.expert_key(layer, expert, projection, "scale")
        out = state_dict[family.expert_key(layer, expert, projection)].shape[0]
        try:
            parts.append(scales.channel_scale(_get(state_dict, key), out))
        except ValueError as error:
            raise CheckpointError(f"{key}: {error}; {_MAKE_IT_AGAIN}") from error
    stacked = torch.stack(parts)
    invalid = scales.first_invalid(stacked)
    if invalid is not None:
        key = family.expert_key(layer, invalid, projection, "scale")
        raise CheckpointError(
            f"{key}: a scale must be finite and positive, and this one is not; {_MAKE_IT_AGAIN}"
        )
    return stacked


def _get(state_dict: StateDict, key: str) -> torch.Tensor:
    tensor = state_dict.get(key)
    if tensor is None:
        raise CheckpointError(
            f"{key}: missing; a layer has scales for all of its experts or for none: "
            f"{_MAKE_IT_AGAIN}"
        )
    return tensor
