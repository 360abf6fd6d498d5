"""The experts' scales of one layer: taken out of a state dict, checked, ready to be fused.

A state dict here has the names that NxDI gives it before it fuses the experts: without Hugging
Face's ``model.``, and with ``.scale`` for ``.weight_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.loading.fused_sample import FusedSample, Samplers
from nxdi_expertscale.loading.names import scale_of
from nxdi_expertscale.numerics import fp8, scales

StateDict = Mapping[str, torch.Tensor]

_MAKE_IT_AGAIN = "make the checkpoint again with 'nxdi-expertscale quantize'"


@dataclass(frozen=True)
class LayerScales:
    """The scales of one layer's experts.

    Attributes:
        layer: The layer's number.
        fused: For each of NxDI's fused weights, ``[E, 1, dim]``, ``torch.float32``: gate then up
            along the last axis for ``gate_up_proj``, unpadded.
        consumed: Names of the tensors that the scales were read from.
        samples: For each of NxDI's fused weights, what it has to hold.
        samplers: For each expert's weight, by its name, what takes its part of them.
    """

    layer: int
    fused: Mapping[str, torch.Tensor]
    consumed: tuple[str, ...]
    samples: Mapping[str, FusedSample]
    samplers: Samplers

    def matches_layout(self, fused: str, weight: torch.Tensor) -> bool:
        """Whether a fused weight has its channels where the scales have them.

        Args:
            fused: A key of :attr:`fused`.
            weight: What NxDI made of the experts' weights, ``[E, in, dim]``, padded or not.
        """
        return self.samples[fused].is_in(weight)


def collect(
    state_dict: StateDict, family: MoEFamily, layer: int, num_experts: int
) -> LayerScales | None:
    """Collect and check the scales of a layer's experts. The state dict stays as it is.

    The samples of their weights are yet to be taken.

    Args:
        state_dict: A checkpoint's tensors, before NxDI fuses them.
        family: The names in it.
        layer: The layer's number.
        num_experts: Experts of a layer, by the model's config.

    Returns:
        None where no expert of the layer has a scale: the layer is in full precision.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype than it should, or a scale
            is not finite and positive.
    """
    keys = {
        projection: [family.expert_key(layer, expert, projection) for expert in range(num_experts)]
        for projection in family.projections
    }
    scale_keys = {projection: list(map(scale_of, some)) for projection, some in keys.items()}
    if not any(key in state_dict for some in scale_keys.values() for key in some):
        _check_unquantized(state_dict, keys)
        return None
    beyond = family.expert_key(layer, num_experts, family.gate)
    if beyond in state_dict:
        raise CheckpointError(
            f"{beyond}: the model's config says {num_experts} experts, the checkpoint has more"
        )
    weights = _checked_weights(state_dict, keys, family.down)
    fused: dict[str, torch.Tensor] = {}
    consumed: list[str] = []
    samples: dict[str, FusedSample] = {}
    samplers = {}
    for name, projections in family.fused.items():
        fused[name] = scales.fuse(
            [_stack_scales(state_dict, scale_keys[part], weights[part]) for part in projections]
        )
        consumed += [key for part in projections for key in scale_keys[part]]
        sample = FusedSample.of(num_experts, len(projections), weights[projections[0]][0])
        samples[name] = sample
        for part, projection in enumerate(projections):
            for expert, key in enumerate(keys[projection]):
                samplers[key] = partial(sample.take, expert, part)
    return LayerScales(layer, fused, tuple(consumed), samples, samplers)


def _check_unquantized(state_dict: StateDict, keys: Mapping[str, Sequence[str]]) -> None:
    for key in (key for some in keys.values() for key in some):
        weight = state_dict.get(key)
        if weight is None or not fp8.is_quantized(weight):
            continue
        if f"{key}_scale_inv" in state_dict:
            raise CheckpointError(
                f"{key}_scale_inv: a checkpoint with block scales cannot be loaded with "
                f"quantized=True; {_MAKE_IT_AGAIN}"
            )
        raise CheckpointError(
            f"{scale_of(key)}: missing, and the weight is {weight.dtype}; {_MAKE_IT_AGAIN}"
        )


def _checked_weights(
    state_dict: StateDict, keys: Mapping[str, Sequence[str]], down: str
) -> dict[str, list[torch.Tensor]]:
    """The experts' weights of each projection, of one dtype and of shapes that fit together."""
    first = _get(state_dict, next(iter(keys.values()))[0])
    for projection, some in keys.items():
        shape = first.shape if projection != down else first.shape[::-1]
        for key in some:
            weight = _get(state_dict, key)
            # Upstream fuses all of a layer into tensors of the first weight's dtype: another one
            # would be cast without its scale.
            if weight.dtype != first.dtype:
                raise CheckpointError(
                    f"{key}: its dtype is {weight.dtype}, that of the layer's other experts "
                    f"{first.dtype}; a layer's experts are quantized all or none: "
                    f"{_MAKE_IT_AGAIN}"
                )
            if weight.shape != shape:
                raise CheckpointError(
                    f"{key}: its shape is {list(weight.shape)}, the layer's other experts say "
                    f"{list(shape)}; {_MAKE_IT_AGAIN}"
                )
    return {projection: [state_dict[key] for key in some] for projection, some in keys.items()}


def _stack_scales(
    state_dict: StateDict, keys: Sequence[str], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The scales of one projection, ``[E, 1, out]``."""
    parts = []
    for key, weight in zip(keys, weights, strict=True):
        try:
            parts.append(scales.channel_scale(_get(state_dict, key), weight.shape[0]))
        except ValueError as error:
            raise CheckpointError(f"{key}: {error}; {_MAKE_IT_AGAIN}") from error
    stacked = torch.stack(parts)
    if not scales.are_valid(stacked):
        key = next(key for key, part in zip(keys, parts, strict=True) if not scales.are_valid(part))
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
