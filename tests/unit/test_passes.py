"""Which modules NxD's two passes convert, and whether what came of them is what was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nxdi_expertscale import ConfigurationError
from nxdi_expertscale.families.built_in import LLAMA4, QWEN3_MOE
from nxdi_expertscale.loading import loaded_experts, passes
from nxdi_expertscale.loading.layout import LayoutError
from nxdi_expertscale.loading.passes import ExpertLayer
from nxdi_expertscale.settings.settings import EXPERT_WISE
from tests.unit import configs

EXPERTS, HIDDEN, INNER = 3, 4, 2


class ExpertFusedLinear(torch.nn.Module):
    """Named as NxD's base class of fused expert layers is."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(EXPERTS, inputs, outputs))


class ExpertFusedColumnParallelLinear(ExpertFusedLinear):
    pass


def model_of(layers: int, *, second_path: bool = False) -> torch.nn.Module:
    """Modules with the names of NxDI's Qwen3 MoE."""
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList()
    for _ in range(layers):
        layer, mlp, experts, op = (torch.nn.Module() for _ in range(4))
        op.gate_up_proj = ExpertFusedColumnParallelLinear(HIDDEN, 2 * INNER)
        op.down_proj = ExpertFusedLinear(INNER, HIDDEN)
        experts.mlp_op, mlp.expert_mlps, layer.mlp = op, experts, mlp
        layer.lm_head = torch.nn.Linear(HIDDEN, HIDDEN)
        if second_path:
            layer.moe_fused_tkg = torch.nn.Module()
            layer.moe_fused_tkg.expert_mlps = experts
        model.layers.append(layer)
    return model


def layer_of(name: str, **changes: object) -> ExpertLayer:
    layer = ExpertLayer((name,), EXPERT_WISE, (EXPERTS, HIDDEN, INNER), (EXPERTS, 1, INNER))
    return replace(layer, **changes)  # type: ignore[arg-type]


def experts_of(layer: int, **changes: object) -> list[ExpertLayer]:
    return [
        layer_of(f"layers.{layer}.mlp.expert_mlps.mlp_op.{name}", **changes)
        for name in ("gate_up_proj", "down_proj")
    ]


GATE_UP, DOWN = (layer.name for layer in experts_of(0))


def test_expert_layers_are_found_with_every_path_and_what_they_are() -> None:
    model = model_of(1, second_path=True)
    down = model.get_submodule(DOWN)
    down.quantization_type = EXPERT_WISE  # type: ignore[assignment]
    down.scale = torch.nn.Parameter(torch.ones(EXPERTS, 1, HIDDEN))

    found = passes.find_expert_layers(model)

    assert found == (
        ExpertLayer(
            (GATE_UP, "layers.0.moe_fused_tkg.expert_mlps.mlp_op.gate_up_proj"),
            "",
            (EXPERTS, HIDDEN, 2 * INNER),
            (),
        ),
        ExpertLayer(
            (DOWN, "layers.0.moe_fused_tkg.expert_mlps.mlp_op.down_proj"),
            EXPERT_WISE,
            (EXPERTS, INNER, HIDDEN),
            (EXPERTS, 1, HIDDEN),
        ),
    )
    assert [layer.is_quantized for layer in found] == [False, True]


def test_dense_model_has_no_expert_layers() -> None:
    assert passes.find_expert_layers(torch.nn.Sequential(torch.nn.Linear(2, 2))) == ()


def test_experts_get_a_pass_of_their_own_at_all_their_paths() -> None:
    layers = passes.find_expert_layers(model_of(1, second_path=True))

    plan = passes.plan_passes(layers, ["lm_head"], ["lm_head"], QWEN3_MOE, expert_wise=True)

    every_path = tuple(path for layer in layers for path in layer.paths)
    assert len(every_path) == 4
    assert plan == passes.Passes(("lm_head", *every_path), every_path)


def test_excluded_experts_are_in_neither_pass() -> None:
    layers = passes.find_expert_layers(model_of(2))

    plan = passes.plan_passes(layers, [], ["layers.0.mlp.experts"], QWEN3_MOE, expert_wise=True)

    assert set(plan.expert_wise) == {
        "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj",
        "layers.1.mlp.expert_mlps.mlp_op.down_proj",
    }
    assert set(plan.skipped) == {GATE_UP, DOWN, *plan.expert_wise}


def test_without_the_flag_there_is_one_pass_that_skips_what_is_excluded() -> None:
    layers = passes.find_expert_layers(model_of(2))

    plan = passes.plan_passes(layers, [], ["layers.0.mlp.experts"], QWEN3_MOE, expert_wise=False)

    assert plan == passes.Passes((GATE_UP, DOWN))


@pytest.mark.parametrize(
    ("names", "excluded"),
    [
        (["v_proj"], ["v_proj"]),
        (["qkv_proj"], ["q_proj", "k_proj", "v_proj"]),
        (["self_attn.q_proj", "lm_head"], ["q_proj", "lm_head"]),
        (["mlp.experts"], []),
    ],
)
def test_excluded_modules_are_named_by_their_whole_paths(
    names: list[str], excluded: list[str]
) -> None:
    model = model_of(1)
    attention, projections = torch.nn.Module(), torch.nn.Module()
    for name in ("q_proj", "k_proj", "v_proj"):
        projections.add_module(name, torch.nn.Linear(HIDDEN, HIDDEN))
    attention.qkv_proj = projections
    model.get_submodule("layers.0").self_attn = attention  # type: ignore[assignment]
    paths = {name: f"layers.0.self_attn.qkv_proj.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    paths["lm_head"] = "layers.0.lm_head"

    found = passes.find_excluded_modules(model, names, QWEN3_MOE)

    assert set(found) == {paths[name] for name in excluded}


class ColumnParallelLinear(torch.nn.Linear):
    """By the name of NxD's."""


class SharedExperts(torch.nn.Module):
    """By the name of NxD's."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = ColumnParallelLinear(HIDDEN, HIDDEN, bias=False)


def test_modules_that_nxd_cannot_load_quantized_are_left_alone() -> None:
    model = model_of(1)
    layer = model.get_submodule("layers.0")
    layer.q_proj = ColumnParallelLinear(HIDDEN, HIDDEN)  # type: ignore[assignment]
    layer.o_proj = ColumnParallelLinear(HIDDEN, HIDDEN, bias=False)  # type: ignore[assignment]
    layer.shared_experts = SharedExperts()  # type: ignore[assignment]

    found = passes.find_excluded_modules(model, [], QWEN3_MOE)

    assert found == ("layers.0.q_proj", "layers.0.shared_experts.down_proj")


def test_what_the_family_cannot_load_quantized_is_skipped() -> None:
    plan = passes.plan_passes([], [], [], LLAMA4, expert_wise=True)

    assert plan == passes.Passes(LLAMA4.full_precision)


def test_layers_that_are_quantized_already_are_left_alone() -> None:
    plan = passes.plan_passes(experts_of(0), [], [], QWEN3_MOE, expert_wise=True)

    assert plan == passes.Passes(())


def test_experts_for_hybrid_sharding_and_for_fused_token_generation_are_refused() -> None:
    second = "layers.0.mlp.expert_mlps.mlp_op_tkg.down_proj"
    layer = layer_of(second, paths=(second, "layers.0.moe_fused_tkg.x"), quantization_type="")

    with pytest.raises(ConfigurationError, match=f"hybrid_sharding_config: .*has {second} for"):
        passes.plan_passes([layer], [], [], QWEN3_MOE, expert_wise=True)
    passes.plan_passes([replace(layer, paths=(second,))], [], [], QWEN3_MOE, expert_wise=True)


OFF = configs.settings({"expert_wise_scale": False})


def test_an_expert_layer_by_another_name_is_told() -> None:
    layers = [*experts_of(0), layer_of("layers.0.mlp.experts_v3.down_proj")]

    assert passes.find_family(experts_of(0), configs.settings()) is QWEN3_MOE
    assert passes.find_family(experts_of(0), OFF) is QWEN3_MOE
    with pytest.raises(LayoutError, match=r"experts_v3\.down_proj is not one of layers"):
        passes.find_family(layers, configs.settings())
    assert passes.find_family(layers, OFF) is None


def test_a_model_of_no_family_is_refused_by_its_type() -> None:
    strange = {"model_type": "strange_moe"}

    with pytest.raises(ConfigurationError, match=r"this model \('strange_moe'\): no plugin"):
        passes.find_family(experts_of(0), configs.settings(model=strange))
    off = configs.settings({"expert_wise_scale": False}, strange)
    assert passes.find_family(experts_of(0), off) is None


def test_experts_settings_are_nxds_with_the_dtype_of_the_rest() -> None:
    rest = {
        "quantization_type": "per_channel_symmetric",
        "quantized_dtype": "f8e4m3",
        "clamp_bound": 7.0,
        "quantization_per_channel_axis": 0,
    }
    defaults = {"quantization_type": EXPERT_WISE, "quantized_dtype": "int8", "axis": 2}

    assert passes.expert_wise_q_config(rest, defaults) == {
        "quantization_type": EXPERT_WISE,
        "quantized_dtype": "f8e4m3",
        "axis": 2,
        "clamp_bound": 7.0,
    }
    with pytest.raises(ConfigurationError, match="needs quantization_type='per_channel_symmetric'"):
        passes.expert_wise_q_config({"quantization_type": "per_tensor_symmetric"}, defaults)


def test_layers_of_another_dtype_than_the_configs_are_refused() -> None:
    settings = {"quantized_dtype": torch.int8}

    passes.check_quantized_dtype(torch.int8, settings, "int8")
    passes.check_quantized_dtype(None, settings, None)
    with pytest.raises(ConfigurationError, match=r"quantization_dtype='f8e5m2': .*torch.int8 lay"):
        passes.check_quantized_dtype(torch.float8_e5m2, settings, "f8e5m2")


def test_a_model_with_the_scales_of_each_expert_is_right() -> None:
    kept = experts_of(1, quantization_type="", scale_shape=())

    loaded_experts.check_expert_wise([*experts_of(0), *kept], ["layers.1.mlp.experts"], QWEN3_MOE)


NOT_AS_ASKED: dict[str, tuple[list[ExpertLayer], str]] = {
    "averaged": (
        experts_of(0, quantization_type="per_channel_symmetric", scale_shape=(1, 1, INNER)),
        "gate_up_proj is per_channel_symmetric, and expert_wise_per_channel_symmetric was",
    ),
    "not converted": (
        experts_of(0, quantization_type="", scale_shape=()),
        "gate_up_proj is not quantized, and expert_wise_per_channel_symmetric was",
    ),
    "excluded and converted": (
        [*experts_of(0), *experts_of(1)],
        "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj is expert_wise_per_channel_symmetric, "
        "and full precision was",
    ),
    "scales that experts share": (
        experts_of(0, scale_shape=(1, 1, INNER)),
        r"no scale of shape \[E, 1, dim\], but \(1, 1, 2\)",
    ),
    "no scales": (experts_of(0, scale_shape=()), "but None"),
    "one missing": (experts_of(0)[:1], "no module for .*down_proj, but"),
    "none": ([], "no module for the experts of any layer"),
}


@pytest.mark.parametrize("name", NOT_AS_ASKED)
def test_a_model_that_is_not_what_was_asked_for_is_told(name: str) -> None:
    layers, says = NOT_AS_ASKED[name]

    with pytest.raises(LayoutError, match=says):
        loaded_experts.check_expert_wise(layers, ["layers.1.mlp.experts"], QWEN3_MOE)
