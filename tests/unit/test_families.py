"""The names of the families, read and written; malformed ones are refused."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from nxdi_expertscale import CheckpointError, ConfigurationError, MoEFamily
from nxdi_expertscale.families import lookup, unsupported
from nxdi_expertscale.families.built_in import BUILT_IN, MIXTRAL, QWEN3_MOE
from nxdi_expertscale.families.tensor_names import ExpertTensor

by_name = pytest.mark.parametrize("family", BUILT_IN, ids=lambda family: family.name)


@by_name
@pytest.mark.parametrize("suffix", ["weight", "scale", "weight_scale"])
def test_an_experts_name_that_is_written_can_be_read(family: MoEFamily, suffix: str) -> None:
    for projection in family.projections:
        for key in family.paths(family.expert_key(12, 345, projection, suffix)):
            assert family.names.parse_expert_key(key) == ExpertTensor(12, 345, projection, suffix)
            assert not family.names.is_router_key(key)


@by_name
@pytest.mark.parametrize("prefix", ["mtp.", "another.model.", "x", "model.model."])
def test_names_with_anything_else_before_them_are_no_experts(
    family: MoEFamily, prefix: str
) -> None:
    assert family.names.parse_expert_key(prefix + family.expert_key(0, 1, family.up)) is None
    assert not family.names.is_router_key(prefix + family.router_key(0))
    assert family.names.parse_layer_key(prefix + family.router_key(0)) is None


@by_name
def test_a_routers_name_that_is_written_can_be_read(family: MoEFamily) -> None:
    for suffix in ("weight", "scale"):
        for key in family.paths(family.router_key(3, suffix)):
            assert family.names.is_router_key(key)
    assert family.names.parse_expert_key(family.router_key(3)) is None


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.mlp.experts.0.gate_proj",
        "layers.0.mlp.experts.0.gate_proj.weight.more",
        "layers.0.mlp.experts.x.gate_proj.weight",
        "layers.x.mlp.experts.0.gate_proj.weight",
        "layers.0.mlp.experts.0.w1.weight",
        "layers.0.mlp.experts.gate_proj.weight",
        "mylayers.0.mlp.experts.0.gate_proj.weight",
        "layers.0xmlp.experts.0.gate_proj.weight",
        "layers.0.mlp.shared_expert.gate_proj.weight",
        "layers.0.mlp.gate.weight",
    ],
)
def test_another_tensor_is_no_experts(key: str) -> None:
    assert QWEN3_MOE.names.parse_expert_key(key) is None


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.gate",
        "layers.0.mlp.gate.weight.more",
        "mylayers.0.mlp.gate.weight",
        "layers.0.mlp.experts.0.gate_proj.weight",
    ],
)
def test_another_tensor_is_no_routers(key: str) -> None:
    assert not QWEN3_MOE.names.is_router_key(key)


def test_names_are_those_of_nxdi() -> None:
    assert QWEN3_MOE.expert_key(1, 2, "up_proj") == "layers.1.mlp.experts.2.up_proj.weight"
    assert QWEN3_MOE.router_key(1) == "layers.1.mlp.gate.weight"
    assert (
        QWEN3_MOE.fused_key(1, "gate_up_proj", "scale")
        == "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj.scale"
    )
    assert MIXTRAL.expert_key(1, 2, "w3", "scale") == "layers.1.block_sparse_moe.experts.2.w3.scale"
    assert MIXTRAL.fused_key(0, "down_proj") == "layers.0.mlp.expert_mlps.mlp_op.down_proj.weight"
    assert dict(QWEN3_MOE.fused) == {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    }
    assert dict(MIXTRAL.fused) == {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
    assert MIXTRAL.projections == ("w1", "w3", "w2")


@by_name
def test_the_layer_of_a_module_is_that_of_its_fused_experts(family: MoEFamily) -> None:
    path = family.expert_mlps.format(layer=17)
    for module in (path, f"{path}.mlp_op.down_proj", f"target_model.{path}.mlp_op"):
        assert family.names.layer_of_module(module) == 17
    for module in (f"{path}_v2.mlp_op", f"x{path}", "layers.17.self_attn", "lm_head"):
        assert family.names.layer_of_module(module) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"converter": "package.module.function"}, "converter must be 'package.module:function'"),
        ({"converter": "package.module:"}, "converter must be"),
        ({"converter": ":function"}, "converter must be"),
        ({"converter": "package.module:Class."}, "converter must be"),
        ({"converter": "package.module:a function"}, "converter must be"),
        ({"converter": "*.:function"}, "converter must be"),
        ({"converter": "package.*:function"}, "converter must be"),
        ({"experts": "layers.mlp.experts"}, "experts must say where the layer's number stands"),
        ({"router": "layers.mlp.gate"}, "router must say"),
        ({"expert_mlps": "layers.mlp"}, "expert_mlps must say"),
    ],
)
def test_malformed_family_is_refused_when_it_is_made(settings: dict[str, Any], says: str) -> None:
    usual = {"name": "mine", "model_types": ("mine",), "converter": "package.module:Class.convert"}
    MoEFamily(**usual)  # type: ignore[arg-type]

    with pytest.raises(ConfigurationError, match=f"^family 'mine': {re.escape(says)}"):
        MoEFamily(**{**usual, **settings})


@pytest.mark.parametrize("as_mapping", [True, False])
@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        (QWEN3_MOE, {"num_experts": 8, "num_experts_per_tok": 2}, (8, 2)),
        (QWEN3_MOE, {"num_local_experts": 8, "num_experts_per_tok": 2}, (8, 2)),
        (QWEN3_MOE, {"num_experts": 8, "num_local_experts": 4}, (8, None)),
        (QWEN3_MOE, {"num_experts": None, "num_local_experts": 4}, (4, None)),
        (QWEN3_MOE, {"num_experts": True, "num_experts_per_tok": 2.0}, (None, None)),
        (MIXTRAL, {"num_experts": 8, "num_local_experts": 4}, (4, None)),
        (MIXTRAL, {}, (None, None)),
    ],
)
def test_sizes_are_read_from_a_config_of_either_kind(
    as_mapping: bool, family: MoEFamily, sizes: dict[str, Any], expected: tuple[Any, Any]
) -> None:
    config = sizes if as_mapping else SimpleNamespace(**sizes)

    assert (family.experts_of(config), family.experts_per_token_of(config)) == expected


def test_width_of_an_expert_is_not_that_of_a_dense_layer() -> None:
    sizes = {"moe_intermediate_size": 768, "intermediate_size": 6144}

    assert QWEN3_MOE.intermediate_size_of(sizes) == 768
    assert MIXTRAL.intermediate_size_of(sizes) == 6144
    assert QWEN3_MOE.intermediate_size_of({"intermediate_size": 6144}) == 6144


def test_family_of_a_model_type() -> None:
    assert lookup.family_of("qwen3_moe", BUILT_IN) is QWEN3_MOE
    assert lookup.family_of("mixtral", BUILT_IN) is MIXTRAL
    assert lookup.family_of("qwen3", BUILT_IN) is None
    assert lookup.family_of(None, BUILT_IN) is None
    assert lookup.require_family("mixtral", BUILT_IN, "config.json") is MIXTRAL


@pytest.mark.parametrize(
    ("model_type", "known", "says"),
    [
        ("qwen3", BUILT_IN, "supported are: deepseek_v3, .*llama4, llama4_text, .*mixtral, "),
        (None, (), "supported are: none"),
        ("gpt_oss", BUILT_IN, "MXFP4"),
        ("dbrx", BUILT_IN, "drops every scale"),
    ],
)
def test_another_model_type_is_refused_naming_the_file(
    model_type: str | None, known: tuple[MoEFamily, ...], says: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"^a/config.json: model_type .*{says}"):
        lookup.require_family(model_type, known, "a/config.json")


def test_every_built_in_family_is_of_another_name_and_type() -> None:
    kinds = [kind for family in BUILT_IN for kind in family.model_types]

    assert len(kinds) == len(set(kinds))
    assert len({family.name for family in BUILT_IN}) == len(BUILT_IN)


def test_stacked_experts_are_named_by_their_layer() -> None:
    key = QWEN3_MOE.stacked_key(3, "gate_up_proj")

    assert key == "layers.3.mlp.experts.gate_up_proj"
    assert QWEN3_MOE.names.parse_stacked_key(f"model.{key}") == (3, "gate_up_proj")
    assert MIXTRAL.stacked is None
    assert MIXTRAL.names.parse_stacked_key("layers.3.block_sparse_moe.experts.gate_up_proj") is None


def test_unsupported_model_without_a_type_is_known_by_its_module() -> None:
    module = "neuronx_distributed_inference.models.dbrx.modeling_dbrx"

    found = unsupported.find_unsupported(None, [module])
    assert found is not None
    assert "DBRX" in found.reason
    assert unsupported.find_unsupported("qwen3_moe", [module]) is None
    assert unsupported.find_unsupported(None, ["another"]) is None


def test_contributed_unsupported_model_is_known_in_whatever_package() -> None:
    for module in ("modeling_trinity", "src.modeling_trinity", "mine.trinity.modeling_trinity"):
        found = unsupported.find_unsupported(None, [module])
        assert found is not None
        assert "Trinity" in found.reason
    assert unsupported.find_unsupported(None, ["not_modeling_trinity"]) is None


def test_no_model_is_both_supported_and_not() -> None:
    supported = {name for family in BUILT_IN for name in family.model_types}

    assert not supported & {name for model in unsupported.UNSUPPORTED for name in model.model_types}
