"""The experts' weights of one layer, one by one in a state dict, put into the tensors of all.

NxDI's converters differ: most take a layer's experts one by one, some take them stacked.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily, Stacking
from nxdi_expertscale.loading.huge_pages import use_huge_pages
from nxdi_expertscale.numerics.transpose import copy_transposed


def stack(
    state_dict: MutableMapping[str, torch.Tensor], family: MoEFamily, layer: int, num_experts: int
) -> None:
    """Replace a layer's experts by ``gate_up_proj`` and ``down_proj`` with all of them.

    A layer without experts, or with experts that are stacked already, stays as it is. Each expert
    is taken out as it is copied, so that no more than one tensor is there twice.

    Args:
        state_dict: A checkpoint's tensors, each expert's weight ``[out, in]``; changed in place.
        family: The names in it, and the axes of the result.
        layer: The layer's number.
        num_experts: Experts of a layer.

    Raises:
        CheckpointError: An expert's weight is missing, or has another shape or dtype than those
            before it.
    """
    if family.expert_key(layer, 0, family.gate) not in state_dict:
        return
    for fused, projections in family.fused.items():
        keys = [
            [family.expert_key(layer, expert, projection) for projection in projections]
            for expert in range(num_experts)
        ]
        first = [_weight(state_dict, key) for key in keys[0]]
        outputs, inputs = sum(weight.shape[0] for weight in first), first[0].shape[1]
        shape, dtype = [weight.shape for weight in first], first[0].dtype
        del first
        # [E, out, in] to write to, whichever of the two is last in memory.
        if family.stacked is Stacking.INPUTS_FIRST:
            stacked = torch.empty(num_experts, inputs, outputs, dtype=dtype)
            as_linear = stacked.transpose(1, 2)
        else:
            stacked = as_linear = torch.empty(num_experts, outputs, inputs, dtype=dtype)
        use_huge_pages(stacked)
        for expert, parts in enumerate(keys):
            start = 0
            for key, expected in zip(parts, shape, strict=True):
                weight = _weight(state_dict, key)
                if weight.shape != expected or weight.dtype != dtype:
                    raise CheckpointError(
                        f"{key}: it is {weight.dtype} {list(weight.shape)}, the layer's other "
                        f"experts are {dtype} {list(expected)}; download or make the checkpoint "
                        "again"
                    )
                place = as_linear[expert, start : start + weight.shape[0]]
                if family.stacked is Stacking.INPUTS_FIRST:
                    copy_transposed(weight, place.T)
                else:
                    place.copy_(weight)
                start += weight.shape[0]
                del state_dict[key]
        state_dict[family.stacked_key(layer, fused)] = stacked


def _weight(state_dict: MutableMapping[str, torch.Tensor], key: str) -> torch.Tensor:
    weight = state_dict.get(key)
    if weight is None:
        raise CheckpointError(
            f"{key}: missing; download or make the checkpoint again, with all experts of the layer"
        )
    return weight
