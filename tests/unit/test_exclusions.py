from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.families.built_in import LLAMA4, MIXTRAL, QWEN3_MOE
from nxdi_expertscale.families.exclusions import (
    PartOfExperts,
    are_experts_excluded,
    attention_without_scales,
    expand_exclusions,
    find_part_of_fused,
    is_excluded,
    parse_exclusions,
)
from nxdi_expertscale.families.known_modules import check_names


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
        (["gate_up_proj", "down_proj"], True),
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
        (["gate_up"], "gate_up"),
    ],
)
def test_a_part_of_what_is_fused_is_refused_with_what_to_name(
    names: list[str], refused: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        is_excluded(EXPERT, names, QWEN3_MOE)

    assert f"modules_to_not_convert: {refused!r} names a part" in str(error.value)
    assert str(error.value).endswith("name all experts of the layer: 'layers.1.mlp.experts'")


def test_a_module_that_nxdi_has_fused_is_decided_as_its_experts_are() -> None:
    module = "layers.1.mlp.expert_mlps.mlp_op.down_proj"

    assert is_excluded(module, ["layers.1.mlp.experts"], QWEN3_MOE)
    assert not is_excluded(module, ["layers.0.mlp.experts"], QWEN3_MOE)


Q, K, V, OUT = (f"layers.1.self_attn.{name}_proj" for name in "qkvo")
IN_CHECKPOINT = {
    Q: "layers.1.self_attn.qkv_proj.q_proj",
    K: "layers.1.self_attn.qkv_proj.k_proj",
    V: "layers.1.self_attn.qkv_proj.v_proj",
    OUT: "layers.1.self_attn.o_proj.o_proj",
}
"""For each projection of an attention in a checkpoint, NxDI's module."""
FUSED = "layers.1.self_attn.qkv_proj.Wqkv"


@pytest.mark.parametrize(
    ("name", "excluded"),
    [
        ("qkv_proj", [Q, K, V]),
        ("qkv", [Q, K, V]),
        ("Wqkv", [Q, K, V]),
        ("layers.1.self_attn.Wqkv", [Q, K, V]),
        ("layers.0.self_attn.Wqkv", []),
        ("tkg_qkv_proj", [Q, K, V]),
        ("qkv_proj.q_proj", [Q]),
        ("o_proj.o_proj", [OUT]),
        ("o_proj", [OUT]),
        ("self_attn.q_proj", [Q]),
        ("v_proj", [V]),
        ("model.layers.1.self_attn", [Q, K, V, OUT]),
        ("layers.0.self_attn", []),
        ("self_attn", [Q, K, V, OUT]),
        ("proj", [Q, K, V, OUT]),
    ],
)
def test_a_name_holds_for_the_checkpoint_and_for_nxdis_module_together(
    name: str, excluded: list[str]
) -> None:
    for path, module in IN_CHECKPOINT.items():
        for found in (path, f"model.{path}", module, module.replace(".qkv_", ".cte_qkv_")):
            assert is_excluded(found, [name], QWEN3_MOE) is (path in excluded), found


def test_a_family_with_other_prefixes_names_the_same_modules() -> None:
    assert is_excluded("language_model.model.layers.1.self_attn.k_proj", ["qkv_proj"], LLAMA4)
    assert is_excluded(IN_CHECKPOINT[K], ["language_model.model.layers.1"], LLAMA4)
    assert not is_excluded("vision_model.layers.1.self_attn.k_proj", ["qkv_proj"], LLAMA4)


def test_the_head_may_have_the_prefix_that_it_never_has() -> None:
    assert is_excluded("lm_head", ["model.lm_head"], QWEN3_MOE)


@pytest.mark.parametrize(
    ("names", "excluded"),
    [(["qkv_proj"], True), (["q_proj", "k_proj", "v_proj"], True), (["o_proj"], False)],
)
def test_what_is_fused_is_decided_as_a_whole(names: list[str], excluded: bool) -> None:
    assert is_excluded(FUSED, names, QWEN3_MOE) is excluded
    assert find_part_of_fused(names, 2, QWEN3_MOE, fused_qkv=True) is None
    attention = ("layers.0.self_attn", "layers.1.self_attn") if excluded else ()
    assert attention_without_scales(names, 2, QWEN3_MOE) == attention


@pytest.mark.parametrize("names", [["v_proj"], ["layers.1.self_attn.q_proj", "k_proj"]])
def test_a_part_of_fused_queries_keys_and_values_is_refused(names: list[str]) -> None:
    assert find_part_of_fused(names, 2, QWEN3_MOE, fused_qkv=False) is None
    part = find_part_of_fused(names, 2, QWEN3_MOE, fused_qkv=True)

    assert part is not None
    message = str(part.to_error())
    assert message.startswith("modules_to_not_convert keeps layers.")
    assert "with fused_qkv=True NxDI fuses it with others in one dtype; name all of la" in message
    assert message.endswith(".self_attn.v_proj, or set fused_qkv=False")
    for call in (is_excluded, attention_without_scales):
        with pytest.raises(ConfigurationError, match=r"^modules_to_not_convert keeps layers"):
            call(FUSED, names, QWEN3_MOE) if call is is_excluded else call(names, 2, QWEN3_MOE)


def test_a_part_of_the_experts_is_found_in_any_layer() -> None:
    part = find_part_of_fused(["layers.1.mlp.experts.0"], 2, QWEN3_MOE, fused_qkv=False)

    assert part == PartOfExperts("'layers.1.mlp.experts.0'", "'layers.1.mlp.experts'")


def test_attention_is_named_as_both_name_it() -> None:
    assert expand_exclusions(["self_attn", "lm_head"], 2, QWEN3_MOE) == ("self_attn", "lm_head")
    assert expand_exclusions(["o_proj.o_proj"], 2, QWEN3_MOE) == (
        "o_proj.o_proj",
        "layers.0.self_attn.o_proj",
        "layers.1.self_attn.o_proj",
    )
    assert expand_exclusions(["layers.1.self_attn.q_proj"], 2, QWEN3_MOE) == (Q, IN_CHECKPOINT[Q])


PATHS = [
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    *(f"model.{path}" for path in IN_CHECKPOINT),
    *(f"model.layers.1.mlp.experts.{e}.{p}" for e in range(4) for p in QWEN3_MOE.projections),
    "model.layers.1.mlp.gate",
]


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "model.lm_head",
        "embed_tokens",
        "self_attn",
        "qkv_proj",
        "mlp.gate",
        "mlp.router",
        "mlp.experts",
        "expert_mlps.mlp_op",
        "layers.1",
        "norm",
    ],
)
def test_a_name_of_the_checkpoint_or_of_nxdis_modules_is_known(name: str) -> None:
    check_names([name], PATHS, 2, QWEN3_MOE)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("self_atn.q_proj", "did you mean 'self_attn.q_proj'"),
        ("model.layers.1.self_attn.qproj", "did you mean 'layers.1.self_attn.q_proj'"),
        ("lmhead", "did you mean 'lm_head'?"),
        ("layers.2.self_attn", "did you mean 'layers.1.self_attn'"),
        ("mlp.expert.down_proj", " or 'mlp.expert_mlps.mlp_op'?"),
        ("xyzzy", "remove it"),
    ],
)
def test_a_name_that_no_module_has_is_refused_with_names_that_are_near(
    name: str, says: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        check_names(["lm_head", name], PATHS, 2, QWEN3_MOE)

    message = str(refused.value)
    assert message.startswith(f"modules_to_not_convert: {name!r} is no part of any module's name; ")
    assert says in message
    assert "experts.0" not in message


def test_what_the_family_keeps_may_be_named_where_a_model_has_none() -> None:
    check_names(["vision_model"], ["lm_head"], 2, LLAMA4)
    with pytest.raises(ConfigurationError, match="'vision_model' is no part"):
        check_names(["vision_model"], ["lm_head"], 2, QWEN3_MOE)


def test_exclusions_are_a_list_of_names() -> None:
    assert parse_exclusions(None) == ()
    assert parse_exclusions(["lm_head", "mlp.gate"]) == ("lm_head", "mlp.gate")
    for value, says in (
        ("lm_head", r"is one string; give a list of names, \['lm_head'\]"),
        (["lm_head", ""], "an empty name would exclude every module"),
        (["model."], "an empty name would exclude every module"),
        ([1], r"must be a list of names, not \[1\]"),
        (3, "must be a list of names, not 3"),
    ):
        with pytest.raises(ConfigurationError, match=f"^modules_to_not_convert: {says}"):
            parse_exclusions(value)


def _parts_of_parts(count: int) -> list[str]:
    path = ".self_attn.qkv_proj"
    return [f"{number}{path[: 1 + number % len(path)]}" for number in range(count)]


@pytest.mark.parametrize(
    "names",
    [
        lambda count: [f"layers.{layer}.mlp.experts" for layer in range(count)],
        lambda count: [f"layers.{layer}.self_attn.qkv_proj" for layer in range(count)],
        lambda count: [f"{layer}.mlp.experts" for layer in range(count)],
        _parts_of_parts,
    ],
    ids=["experts", "attention", "ends of numbers", "parts of parts"],
)
def test_time_goes_with_names_and_layers_and_not_with_their_product(
    names: Callable[[int], list[str]],
) -> None:
    def seconds(count: int, num_layers: int) -> float:
        given = names(count)
        paths = [f"layers.{layer}.mlp.experts.0.up_proj" for layer in range(num_layers)]
        start = time.process_time()
        expand_exclusions(given, num_layers, QWEN3_MOE)
        find_part_of_fused(given, num_layers, QWEN3_MOE, fused_qkv=False)
        check_names(given, paths, num_layers, QWEN3_MOE)
        return time.process_time() - start

    small = min(seconds(312, 1_024) for _ in range(3))

    # Sixteen times the names and the layers; their product is 256 times as large.
    assert seconds(5_000, 16_384) < 64 * small


@pytest.mark.parametrize("seed", range(20))
def test_many_names_decide_what_each_layer_decides_by_itself(seed: int) -> None:
    """What is looked up by a layer's number is what a look at every name finds."""
    generator = random.Random(seed)
    paths = [
        path
        for layer in range(13)
        for path in (
            f"layers.{layer}.mlp.experts.0.up_proj",
            f"layers.{layer}.mlp.expert_mlps.mlp_op.gate_up_proj",
            f"layers.{layer}.self_attn.q_proj",
            f"layers.{layer}.self_attn.qkv_proj.q_proj",
            f"layers.{layer}.self_attn.Wqkv",
            f"layers.{layer}.mlp.gate",
        )
    ]
    names = []
    for _ in range(generator.choice([1, 3, 10, 40])):
        path = generator.choice(paths)
        start = generator.randrange(len(path))
        names.append(path[start : generator.randrange(start, len(path)) + 1])

    def outcome(path: str, names: list[str]) -> bool | str:
        try:
            return is_excluded(path, names, QWEN3_MOE)
        except ConfigurationError:
            return "a part"

    for path in paths:
        alone = {outcome(path, [name]) for name in names}
        together = outcome(path, names)
        # Names of parts may make a whole together.
        by_worst = {True: {True}, "a part": {True, "a part"}, False: {False}}
        assert together in by_worst[next(found for found in by_worst if found in alone)]
