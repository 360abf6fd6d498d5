"""A state dict before and after NxDI's converter: scales out, scales in, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdi_expertscale import CheckpointError, ConfigurationError
from nxdi_expertscale.families.built_in import LLAMA4, QWEN3_MOE
from nxdi_expertscale.loading import conversion
from nxdi_expertscale.loading.fused_sample import take_now
from nxdi_expertscale.loading.layout import LayoutError
from nxdi_expertscale.numerics import fp8
from nxdi_expertscale.settings.settings import Settings
from tests.unit import configs
from tests.unit.test_expert_scales import EXPERTS, HIDDEN, INTERMEDIATE, fused_weights, layer_of

MODEL = {"num_hidden_layers": 1, "num_experts": EXPERTS}
ROUTER = "layers.0.mlp.gate"
LM_HEAD = "lm_head"
GATE_UP, DOWN = (
    f"layers.0.mlp.expert_mlps.mlp_op.{name}" for name in ("gate_up_proj", "down_proj")
)
StateDict = dict[str, torch.Tensor]


def quantized(name: str, out: int, inputs: int = HIDDEN) -> StateDict:
    values = torch.randn(out, inputs, generator=torch.Generator().manual_seed(3))
    weight, scale = fp8.quantize_per_channel(values)
    return {f"{name}.weight": weight, f"{name}.scale": scale}


def checkpoint() -> StateDict:
    return {
        **layer_of(QWEN3_MOE),
        f"{ROUTER}.weight": torch.randn(EXPERTS, HIDDEN),
        **quantized(LM_HEAD, 5),
    }


def converted_by_nxdi(state_dict: StateDict, pad: int = 0) -> StateDict:
    """What NxDI's converter makes of a state dict without the experts' scales."""
    found = fused_weights(state_dict, pad=pad)
    kept = {key: tensor for key, tensor in state_dict.items() if ".experts." not in key}
    return {
        **kept,
        f"{GATE_UP}.weight": found["gate_up_proj"],
        f"{DOWN}.weight": found["down_proj"],
    }


def flipped(weight: torch.Tensor) -> torch.Tensor:
    """The channels of a weight in another order."""
    return weight.view(torch.uint8).flip(2).view(weight.dtype)


def settings(**changes: Any) -> Settings:
    """The settings of a small model, with the flag, but for some of the neuron config."""
    return configs.settings(changes, MODEL)


LLAMA4_SETTINGS = configs.settings(
    model={"model_type": "llama4_text", "num_hidden_layers": 1, "num_local_experts": EXPERTS}
)


def convert(pad: int = 0, **changes: Any) -> tuple[StateDict, StateDict]:
    """A checkpoint, and what comes of it."""
    state_dict = checkpoint()
    before = dict(state_dict)
    layers = conversion.take_out_scales(state_dict, QWEN3_MOE, settings(**changes))
    take_now(conversion.samplers(layers), state_dict)
    converted = converted_by_nxdi(state_dict, pad=pad)
    conversion.put_in_scales(converted, layers, QWEN3_MOE, settings(**changes))
    return before, converted


def test_each_expert_keeps_its_scale() -> None:
    before, converted = convert()

    for expert in range(EXPERTS):
        gate, up, down = (
            before[QWEN3_MOE.expert_key(0, expert, name, "scale")].flatten()
            for name in QWEN3_MOE.projections
        )
        assert torch.equal(converted[f"{GATE_UP}.scale"][expert, 0], torch.cat([gate, up]))
        assert torch.equal(converted[f"{DOWN}.scale"][expert, 0], down)
    assert not any(".experts." in key for key in converted)
    assert converted[f"{LM_HEAD}.scale"] is before[f"{LM_HEAD}.scale"]


def test_without_the_flag_the_scales_are_averaged_and_a_warning_says_how_far_they_lie_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, converted = convert(expert_wise_scale=False)

    down = torch.stack(
        [before[QWEN3_MOE.expert_key(0, e, "down_proj", "scale")] for e in range(EXPERTS)]
    )
    assert converted[f"{DOWN}.scale"].shape == (1, 1, HIDDEN)
    assert torch.allclose(converted[f"{DOWN}.scale"].flatten(), down.mean(dim=0).flatten())
    [warning] = caplog.messages
    assert "expert_wise_scale is off" in warning
    assert warning.endswith("Set expert_wise_scale=True")


def test_padding_of_the_weight_is_padding_of_the_scale() -> None:
    _, converted = convert(pad=2)

    scale = converted[f"{GATE_UP}.scale"]
    assert scale.shape == (EXPERTS, 1, 2 * (INTERMEDIATE + 2))
    assert not scale[:, :, INTERMEDIATE : INTERMEDIATE + 2].any()


def test_hybrid_shardings_second_experts_get_scales_of_their_own() -> None:
    degrees = SimpleNamespace(moe_cte_ep_degree=1, moe_tkg_ep_degree=1)

    _, converted = convert(hybrid_sharding_config=degrees)

    for name in (GATE_UP, DOWN):
        second = converted[f"{name.replace('mlp_op', 'mlp_op_tkg')}.scale"]
        assert torch.equal(second, converted[f"{name}.scale"])
        assert second.data_ptr() != converted[f"{name}.scale"].data_ptr()


def test_quantized_router_becomes_numbers_in_the_models_dtype(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state_dict = {**checkpoint(), **quantized(ROUTER, EXPERTS)}
    values = fp8.dequantize(state_dict[f"{ROUTER}.weight"], state_dict[f"{ROUTER}.scale"])

    conversion.take_out_scales(state_dict, QWEN3_MOE, settings(torch_dtype=torch.bfloat16))

    assert f"{ROUTER}.scale" not in state_dict
    assert torch.equal(state_dict[f"{ROUTER}.weight"], values.to(torch.bfloat16))
    assert caplog.messages[0].startswith("1 routers are quantized")


def test_stacked_experts_are_made_where_the_converter_takes_them_so() -> None:
    state_dict = layer_of(LLAMA4)

    [layer] = conversion.take_out_scales(state_dict, LLAMA4, LLAMA4_SETTINGS)

    assert set(state_dict) == {LLAMA4.stacked_key(0, fused) for fused in layer.fused}


def change(name: str, value: Any) -> Callable[[StateDict], Any]:
    return lambda state_dict: state_dict.update({name: value})


DTYPES = {None: torch.float8_e4m3fn, "int8": torch.int8}

REFUSED: dict[str, tuple[Callable[[StateDict], Any], dict[str, Any], type[Exception], str]] = {
    "experts that are excluded": (
        lambda state_dict: None,
        {"modules_to_not_convert": ["layers.0.mlp.experts"]},
        ConfigurationError,
        "layers.0.mlp.experts.0.gate_proj.scale: layer 0's experts are quantized",
    ),
    "a linear layer that is excluded": (
        lambda state_dict: None,
        {"modules_to_not_convert": ["lm_head"]},
        ConfigurationError,
        "lm_head.weight: it is quantized in the checkpoint, and modules_to_not_convert",
    ),
    "another dtype": (
        lambda state_dict: None,
        {"quantization_dtype": "int8"},
        ConfigurationError,
        "its dtype is torch.float8_e4m3fn, it has a scale, and quantization_dtype='int8'",
    ),
    "a router without a scale": (
        change(f"{ROUTER}.weight", torch.zeros(EXPERTS, HIDDEN).to(torch.float8_e4m3fn)),
        {},
        CheckpointError,
        f"{ROUTER}.scale: missing",
    ),
    "a router's scale of another shape": (
        lambda state_dict: state_dict.update(
            {**quantized(ROUTER, EXPERTS), f"{ROUTER}.scale": torch.ones(EXPERTS + 1, 1)}
        ),
        {},
        CheckpointError,
        f"{ROUTER}.scale: a scale of shape [5, 1]",
    ),
    "a router's scale of zero": (
        lambda state_dict: state_dict.update(
            {**quantized(ROUTER, EXPERTS), f"{ROUTER}.scale": torch.zeros(EXPERTS, 1)}
        ),
        {},
        CheckpointError,
        f"{ROUTER}.scale: a scale must be finite and positive",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_changed(name: str) -> None:
    spoil, changes, error, says = REFUSED[name]
    state_dict = checkpoint()
    spoil(state_dict)
    before = dict(state_dict)

    with pytest.raises(error) as refused:
        conversion.take_out_scales(
            state_dict,
            QWEN3_MOE,
            settings(**changes),
            quantized_dtype=DTYPES[changes.get("quantization_dtype")],
        )

    assert says in str(refused.value)
    assert state_dict.keys() == before.keys()
    assert all(state_dict[key] is before[key] for key in before)


def test_a_config_without_a_number_of_experts_is_told() -> None:
    without = configs.settings(model={**MODEL, "num_experts": None})

    with pytest.raises(LayoutError, match="its config has none of num_experts, num_local_experts"):
        conversion.take_out_scales(checkpoint(), QWEN3_MOE, without)


def test_what_the_family_cannot_load_quantized_is_refused() -> None:
    state_dict = {**layer_of(LLAMA4), **quantized("language_model.lm_head", 5)}

    with pytest.raises(CheckpointError, match=r"lm_head.weight: .* no place for its scale"):
        conversion.take_out_scales(state_dict, LLAMA4, LLAMA4_SETTINGS)


FUSED_OTHERWISE: dict[str, tuple[Callable[[StateDict], Any], str]] = {
    "missing": (lambda made: made.pop(f"{DOWN}.weight"), "a fused weight of shape None"),
    "of fewer experts": (
        lambda made: made.update({f"{DOWN}.weight": made[f"{DOWN}.weight"][1:]}),
        r"of shape \[3, 4, 6\], where \[4, in, out\] was expected",
    ),
    "fused otherwise": (
        lambda made: made.update({f"{GATE_UP}.weight": flipped(made[f"{GATE_UP}.weight"])}),
        "a weight that is not fused as it is known to be",
    ),
    "with a scale already": (
        lambda made: made.update({f"{DOWN}.scale": torch.ones(1)}),
        f"NxDI makes {DOWN}.scale itself",
    ),
    "another without its scale": (
        lambda made: made.pop(f"{LM_HEAD}.scale"),
        f"{LM_HEAD}.weight is torch.float8_e4m3fn and has no scale",
    ),
}


@pytest.mark.parametrize("name", FUSED_OTHERWISE)
def test_a_converter_that_fuses_otherwise_is_told(name: str) -> None:
    spoil, says = FUSED_OTHERWISE[name]
    state_dict = checkpoint()
    layers = conversion.take_out_scales(state_dict, QWEN3_MOE, settings())
    take_now(conversion.samplers(layers), state_dict)
    converted = converted_by_nxdi(state_dict)
    spoil(converted)

    with pytest.raises(LayoutError, match=says):
        conversion.put_in_scales(converted, layers, QWEN3_MOE, settings())


def in_checkpoint(name: str) -> str:
    is_scale = name.endswith(".scale")
    return f"model.{name.removesuffix('scale')}{'weight_scale' if is_scale else ''}"


def test_range_is_looked_at_unless_the_tensors_are_those_of_a_folder_that_is_known() -> None:
    state_dict = checkpoint()
    key = QWEN3_MOE.expert_key(0, 1, "up_proj")
    state_dict[key] = torch.full_like(state_dict[key].float(), 448).to(torch.float8_e4m3fn)
    names = frozenset(
        in_checkpoint(name) for name in state_dict if not name.startswith((LM_HEAD, ROUTER))
    )
    of_another = names | {"model.layers.1.mlp.gate.weight"}

    for checked in (frozenset[str](), of_another):
        with pytest.raises(CheckpointError, match=f"{key}: holds FP8 values beyond ±240"):
            conversion.take_out_scales(
                dict(state_dict), QWEN3_MOE, settings(), checked_tensors=checked
            )
    assert conversion.take_out_scales(state_dict, QWEN3_MOE, settings(), checked_tensors=names)


def test_a_name_that_no_module_has_is_refused_or_without_the_flag_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    says = "modules_to_not_convert: 'lm_haed' is no part of any module's name; did you mean 'lm_h"
    changes = {"modules_to_not_convert": ["lm_haed"]}

    with pytest.raises(ConfigurationError, match=says):
        conversion.take_out_scales(checkpoint(), QWEN3_MOE, settings(**changes))
    conversion.take_out_scales(
        checkpoint(), QWEN3_MOE, settings(**changes, expert_wise_scale=False)
    )
    assert caplog.messages[0].startswith(says)


def test_quantized_attention_that_is_excluded_by_its_modules_name_is_refused() -> None:
    name = "layers.0.self_attn.k_proj"
    state_dict = {**checkpoint(), **quantized(name, 4)}

    with pytest.raises(ConfigurationError, match=f"^{name}.weight: it is quantized in the check"):
        conversion.take_out_scales(
            state_dict, QWEN3_MOE, settings(modules_to_not_convert=["qkv_proj"])
        )


@pytest.mark.parametrize(
    ("fused", "expected"),
    [(True, ("Wqkv", "layers.0.self_attn")), (False, ("Wqkv",))],
)
def test_the_converter_is_told_of_attention_as_it_looks_for_it(
    fused: bool, expected: tuple[str, ...]
) -> None:
    found = settings(modules_to_not_convert=["Wqkv"], fused_qkv=fused)

    assert conversion.names_for_converter(found, QWEN3_MOE, {}) == expected

    biased = {f"layers.0.self_attn.{name}_proj.bias": torch.ones(4) for name in "qkv"}
    without_names = settings(fused_qkv=fused)
    names = conversion.names_for_converter(without_names, QWEN3_MOE, biased)
    assert names == expected[1:]


def test_names_that_a_model_leaves_as_they_are_in_its_checkpoint_are_nxdis() -> None:
    family = replace(
        QWEN3_MOE,
        renames=(
            ("layers.{layer}.mlp.shared", "layers.{layer}.shared"),
            ("layers.{layer}.mlp.gate.bias", "layers.{layer}.mlp.router.bias"),
        ),
    )
    state_dict = {
        "layers.1.mlp.shared.up.weight": torch.ones(1),
        "layers.1.mlp.shared.up.weight_scale": torch.ones(2),
        "layers.1.mlp.gate.bias": torch.ones(3),
        "layers.1.mlp.gate.weight": torch.ones(4),
        "layers.1.self_attn.o_proj.weight_scale": torch.ones(5),
    }

    conversion.name_for_modules(state_dict, family)

    assert {name: len(value) for name, value in state_dict.items()} == {
        "layers.1.shared.up.weight": 1,
        "layers.1.shared.up.scale": 2,
        "layers.1.mlp.router.bias": 3,
        "layers.1.mlp.gate.weight": 4,
        "layers.1.self_attn.o_proj.scale": 5,
    }
    with pytest.raises(CheckpointError, match=r"weight_scale: is there as .*o_proj\.scale as well"):
        conversion.name_for_modules(
            {**state_dict, "layers.1.self_attn.o_proj.weight_scale": torch.ones(1)}, family
        )
