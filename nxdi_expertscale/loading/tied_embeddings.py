"""Embeddings that are the output layer's weight too, which NxDI's MoE models do not know."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch

from nxdi_expertscale.families.declaration import MoEFamily

_EMBEDDINGS, _HEAD = "embed_tokens.weight", "lm_head.weight"
"""Their names in NxDI's models, whatever a checkpoint calls them."""


def is_of_families(
    state_dict: MutableMapping[str, torch.Tensor], families: Sequence[MoEFamily]
) -> bool:
    """Whether a converted state dict has the fused experts of one of these families."""
    return any(
        family.names.layer_of_module(name) is not None for name in state_dict for family in families
    )


def tie_embeddings(state_dict: MutableMapping[str, torch.Tensor]) -> None:
    """Give the output layer the embeddings, where it has no weight of its own.

    A quantized checkpoint may have one: NxDI's own step writes a quantized ``lm_head``.

    Args:
        state_dict: A model's tensors as NxDI converted them; changed in place.
    """
    if _HEAD not in state_dict and _EMBEDDINGS in state_dict:
        state_dict[_HEAD] = state_dict[_EMBEDDINGS].clone()
