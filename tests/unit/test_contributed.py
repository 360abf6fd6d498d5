"""The names of contributed models, as their checkpoints have them and as they are declared."""

from __future__ import annotations

import pytest

from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.lookup import family_of

FAMILIES = {family.name: family for family in BUILT_IN}

EXPERTS = {
    "glm4_moe": "model.layers.3.mlp.experts.7.up_proj.weight",
    "deepseek_v3": "model.layers.3.mlp.experts.7.up_proj.weight",
    "minimax_m2": "model.layers.3.block_sparse_moe.experts.7.w3.weight",
    "olmoe": "model.layers.3.mlp.experts.7.up_proj.weight",
    "solar_open": "model.layers.3.mlp.experts.7.up_proj.weight",
    "minicpm_moe": "model.layers.3.mlp.experts.7.w3.weight",
    "sarvam_moe": "model.layers.3.mlp.experts.7.up_proj.weight",
    "mimo_v2": "model.layers.3.mlp.experts.7.up_proj.weight",
    "qwen3_next": "model.layers.3.mlp.experts.7.up_proj.weight",
}
"""A tensor of an expert in the published checkpoints, by the family's name."""


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_found_by_their_published_names(name: str) -> None:
    place = FAMILIES[name].names.parse_expert_key(EXPERTS[name])

    assert place is not None
    assert (place.layer, place.expert, place.projection) == (3, 7, FAMILIES[name].up)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("mine.modeling_qwen3_coder_moe", "qwen3_moe"),
        ("src.modeling_mixtral", "mixtral"),
        ("modeling_sarvam", "sarvam_moe"),
        ("modeling_mine", None),
    ],
)
def test_config_without_a_type_is_known_by_the_file_that_defines_it(
    module: str, expected: str | None
) -> None:
    family = family_of(None, BUILT_IN, {module, "neuronx_distributed_inference.models.config"})

    assert (None if family is None else family.name) == expected


def renamed(family: MoEFamily, *names: str) -> list[str]:
    return [family.renamed(name) for name in names]


def test_what_a_converter_leaves_is_renamed() -> None:
    bias = "layers.4.mlp.gate.e_score_correction_bias"

    assert renamed(FAMILIES["mimo_v2"], bias, "layers.4.mlp.gate.weight") == [
        "layers.4.mlp.router.e_score_correction_bias",
        "layers.4.mlp.gate.weight",
    ]
