"""Embeddings that are the output layer's weight too."""

from __future__ import annotations

import torch

from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.loading.tied_embeddings import is_of_families, tie_embeddings


def test_output_layer_gets_a_copy_of_the_embeddings() -> None:
    state_dict = {"embed_tokens.weight": torch.ones(3, 2)}

    tie_embeddings(state_dict)

    assert torch.equal(state_dict["lm_head.weight"], torch.ones(3, 2))
    assert state_dict["lm_head.weight"].data_ptr() != state_dict["embed_tokens.weight"].data_ptr()


def test_output_layer_keeps_a_weight_of_its_own() -> None:
    state_dict = {"embed_tokens.weight": torch.ones(3, 2), "lm_head.weight": torch.zeros(3, 2)}

    tie_embeddings(state_dict)

    assert torch.equal(state_dict["lm_head.weight"], torch.zeros(3, 2))


def test_models_of_the_families_are_known_by_their_fused_experts() -> None:
    experts = {"layers.1.mlp.expert_mlps.mlp_op.down_proj.weight": torch.ones(1)}

    assert is_of_families(experts, BUILT_IN)
    assert not is_of_families({"layers.1.mlp.down_proj.weight": torch.ones(1)}, BUILT_IN)
    assert not is_of_families(experts, ())
