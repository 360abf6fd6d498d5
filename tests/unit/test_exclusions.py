from __future__ import annotations

import pytest

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.families.built_in import MIXTRAL, QWEN3_MOE
from nxdi_expertscale.families.exclusions import (
    are_experts_excluded,
    expand_exclusions,
    is_excluded,
)


@pytest.mark.parametrize("name", ["layers.1.mlp.experts", "model.layers.1.mlp.expert_mlps"])
def test_experts_of_a_layer_are_named_in_both_worlds(name: str) -> None:
    found = expand_exclusions(["lm_head", name], 12, QWEN3_MOE)

    assert found[0] == "lm_head"
    assert set(found[1:]) == {"layers.1.mlp.experts", "layers.1.mlp.expert_mlps"}


def test_all_experts_are_named_layer_by_layer() -> None:
    found = expand_exclusions(["block_sparse_moe.experts"], 2, MIXTRAL)

    assert found == (
        "block_sparse_moe.experts",
        "layers.0.block_sparse_moe.experts",
        MIXTRAL.expert_mlps.format(layer=0),
        "layers.1.block_sparse_moe.experts",
        MIXTRAL.expert_mlps.format(layer=1),
    )


def test_one_expert_cannot_be_named() -> None:
    with pytest.raises(ConfigurationError, match=r"name all experts of the layer: 'layers\.1"):
        is_excluded("model.layers.1.mlp.experts.3.up_proj", ["layers.1.mlp.experts.3"], QWEN3_MOE)


def test_a_lone_prefix_names_nothing() -> None:
    assert not is_excluded("lm_head", ["model."], QWEN3_MOE)


EXPERT = "model.layers.1.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("names", "excluded"),
    [
        (["layers.1.mlp.experts"], True),
        (["layers.0.mlp.experts"], False),
        (["layers.1.mlp.expert_mlps"], True),
        (["mlp.experts"], True),
        (["lm_head", "self_attn"], False),
        ([], False),
        (["gate_proj", "up_proj", "down_proj"], True),
        (["mlp_op.gate_up_proj", "expert_mlps.mlp_op.down_proj"], True),
        (["gate_up_proj", "gate_proj", "up_proj", "down_proj"], True),
    ],
)
def test_an_expert_is_decided_with_all_of_its_layer(names: list[str], excluded: bool) -> None:
    assert is_excluded(EXPERT, names, QWEN3_MOE) is excluded
    assert are_experts_excluded(1, names, QWEN3_MOE) is excluded


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["lm_head", "down_proj"], "down_proj"),
        (["mlp_op.gate_up_proj"], "mlp_op.gate_up_proj"),
        (["layers.1.mlp.experts.3"], "layers.1.mlp.experts.3"),
        (["gate_proj", "up_proj"], "gate_proj"),
    ],
)
def test_a_part_of_what_is_fused_is_refused_with_what_to_name(
    names: list[str], refused: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        is_excluded(EXPERT, names, QWEN3_MOE)

    assert f"modules_to_not_convert: {refused!r} names a part" in str(error.value)
    assert str(error.value).endswith("name all experts of the layer: 'layers.1.mlp.experts'")
