"""What is read of NxDI's two configs, whichever attributes a release has."""

from __future__ import annotations

import enum
from types import SimpleNamespace
from typing import Any

import pytest

from nxdi_expertscale.families.built_in import BUILT_IN, MIXTRAL, QWEN3_MOE
from nxdi_expertscale.settings.settings import EXPERT_WISE, read_settings
from tests.unit import configs


class QuantizationType(enum.Enum):
    PER_CHANNEL_SYMMETRIC = "per_channel_symmetric"


class QuantizedDtype(enum.Enum):
    F8E4M3 = "torch.float8_e4m3fn"
    INT8 = "torch.int8"


def test_config_without_attributes_asks_for_nothing() -> None:
    for nothing in (SimpleNamespace(), None):
        settings = read_settings(nothing)

        assert not settings.is_on
        assert not settings.is_quantized
        assert not settings.is_fp8
        assert settings.exclusions == ()
        assert settings.max_length == settings.num_layers == 0
        assert (settings.family, settings.num_experts, settings.experts) == (None, None, None)


@pytest.mark.parametrize("value", ["true", 1, None, "", [], 0, "false"])
def test_flag_is_on_where_it_is_true_and_kept_as_it_is(value: object) -> None:
    assert read_settings(SimpleNamespace(expert_wise_scale=True)).is_on
    settings = read_settings(SimpleNamespace(expert_wise_scale=value))
    assert not settings.is_on
    assert settings.flag is value


@pytest.mark.parametrize(
    ("neuron_config", "expected"),
    [
        ({"quantized": True}, True),
        ({"quantized": False, "quantized_mlp_kernel_enabled": True}, True),
        ({"quantized": False, "activation_quantization_type": "dynamic"}, True),
        ({"quantized": False}, False),
        ({"quantized": False, "activation_quantization_type": None}, False),
    ],
)
def test_quantized_by_any_of_three_settings(neuron_config: dict[str, Any], expected: bool) -> None:
    settings = read_settings(SimpleNamespace(**neuron_config))

    assert settings.is_quantized is expected
    assert settings.quantized is neuron_config["quantized"]


@pytest.mark.parametrize("found", ["per_channel_symmetric", QuantizationType.PER_CHANNEL_SYMMETRIC])
def test_quantization_type_is_known_by_its_name(found: object) -> None:
    settings = read_settings(SimpleNamespace(quantization_type=found))

    assert settings.quantization_type == "per_channel_symmetric"


@pytest.mark.parametrize(
    ("dtype", "name", "is_fp8"),
    [
        ("f8e4m3", "f8e4m3", True),
        ("F8E5M2", "f8e5m2", True),
        (QuantizedDtype.F8E4M3, "f8e4m3", True),
        ("int8", "int8", False),
        (QuantizedDtype.INT8, "int8", False),
    ],
)
def test_dtype_is_known_by_its_name(dtype: object, name: str, is_fp8: bool) -> None:
    settings = read_settings(SimpleNamespace(quantization_dtype=dtype))

    assert (settings.quantization_dtype, settings.is_fp8) == (name, is_fp8)


@pytest.mark.parametrize(
    ("neuron_config", "expected"),
    [
        ({}, True),
        ({"expert_wise_scale": False}, False),
        ({"expert_wise_scale": False, "quantization_type": EXPERT_WISE}, True),
    ],
)
def test_scales_stay_apart_by_the_flag_or_by_upstreams_own_type(
    neuron_config: dict[str, Any], expected: bool
) -> None:
    assert configs.settings(neuron_config).keeps_scales_apart is expected


def test_exclusions_are_read_as_they_are() -> None:
    names = ["a", "b"]
    assert configs.settings({"modules_to_not_convert": names}).exclusions == ("a", "b")
    assert configs.settings({"modules_to_not_convert": None}).exclusions == ()


def test_sizes_are_read_by_the_names_of_the_family() -> None:
    settings = configs.settings()
    mixtral = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    other = configs.settings(model=mixtral)

    assert (settings.num_layers, settings.num_experts, settings.num_experts_per_tok) == (2, 128, 8)
    assert (other.num_experts, other.num_experts_per_tok) == (8, 2)


def test_experts_are_looked_at_where_a_family_is_quantized() -> None:
    assert configs.settings().experts is not None
    assert configs.settings({"quantized": False}).experts is None
    assert configs.settings(model={"model_type": "qwen3"}).experts is None
    # Whatever a dense model's config has in the place of a number is none of our business.
    configs.settings({"batch_size": "many"}, {"model_type": "qwen3"})


def test_number_of_cores_may_be_an_enumerations() -> None:
    two = enum.Enum("LogicalNC", {"TWO": 2}).TWO  # type: ignore[attr-defined]

    # As it is, and as it comes back from NxDI's JSON.
    for cores in (two, dict(vars(two)), 2):
        experts = configs.settings({"logical_nc_config": cores}).experts
        assert experts is not None
        assert experts.logical_nc_config == 2


def test_family_is_known_by_model_type_or_by_the_module_of_the_config() -> None:
    def family_of(model_config: Any) -> Any:
        return read_settings(None, model_config, BUILT_IN).family

    assert family_of(configs.model_config()) is QWEN3_MOE
    assert family_of(configs.model_config(model_type="mixtral")) is MIXTRAL
    assert family_of(configs.model_config(model_type="qwen3")) is None
    assert family_of(None) is None

    module = QWEN3_MOE.converter.partition(":")[0]
    own = type("Config", (), {"__module__": module})
    derived = type("Derived", (own,), {"__module__": "elsewhere"})
    assert family_of(derived()) is QWEN3_MOE
    # A type that is named and that of another model decides.
    derived.model_type = "qwen3"  # type: ignore[attr-defined]
    assert family_of(derived()) is None
