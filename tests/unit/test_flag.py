"""What the flag means: each row of DESIGN's table, on configs that hold nothing but attributes."""

from __future__ import annotations

import enum
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from nxdi_expertscale import ConfigurationError
from nxdi_expertscale.families.built_in import BUILT_IN, MIXTRAL, QWEN3_MOE
from nxdi_expertscale.settings import flag


class QuantizationType(enum.Enum):
    PER_CHANNEL_SYMMETRIC = "per_channel_symmetric"
    PER_TENSOR_SYMMETRIC = "per_tensor_symmetric"


class QuantizedDtype(enum.Enum):
    F8E4M3 = "torch.float8_e4m3fn"
    INT8 = "torch.int8"


def neuron_config(**settings: Any) -> Any:
    usual = {
        "expert_wise_scale": True,
        "quantized": True,
        "quantization_type": "per_channel_symmetric",
        # Long enough for any context: what is looked at here is token generation.
        "max_context_length": 4096,
    }
    return SimpleNamespace(**{**usual, **settings})


def model_config(**sizes: Any) -> Any:
    usual = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8}
    return SimpleNamespace(**{**usual, **sizes})


CPU = flag.Upstream(reads_moe_settings=True, kernel_cores=frozenset())
DEVICE = flag.Upstream(reads_moe_settings=True, kernel_cores=frozenset({1, 2}))
BEFORE_SETTINGS = flag.Upstream(reads_moe_settings=False, kernel_cores=frozenset({1, 2}))


def check(settings: Any, model: Any = None, upstream: flag.Upstream = CPU) -> None:
    flag.check_model(settings, model or model_config(), QWEN3_MOE, upstream)


@pytest.mark.parametrize("value", [True, False])
def test_boolean_is_taken(value: bool) -> None:
    assert flag.parse(value) is value
    assert flag.is_on(SimpleNamespace(expert_wise_scale=value)) is value


@pytest.mark.parametrize("value", ["true", "false", 1, 0, None, "", []])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="expert_wise_scale must be true or false, not"):
        flag.parse(value)
    assert not flag.is_on(SimpleNamespace(expert_wise_scale=value))


def test_config_without_the_flag_has_it_off() -> None:
    assert not flag.is_on(SimpleNamespace())
    assert not flag.is_on(None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quantized": True}, True),
        ({"quantized": False, "quantized_mlp_kernel_enabled": True}, True),
        ({"quantized": False}, False),
        ({"quantized": False, "quantized_mlp_kernel_enabled": False}, False),
        ({}, False),
    ],
)
def test_quantized_by_either_setting(settings: dict[str, Any], expected: bool) -> None:
    assert flag.is_quantized(SimpleNamespace(**settings)) is expected


@pytest.mark.parametrize("found", ["per_channel_symmetric", QuantizationType.PER_CHANNEL_SYMMETRIC])
def test_per_channel_is_what_the_flag_needs(found: object) -> None:
    flag.check_neuron_config(neuron_config(quantization_type=found))


@pytest.mark.parametrize(
    "found",
    [
        "per_tensor_symmetric",
        "expert_wise_per_channel_symmetric",
        "blockwise_symmetric",
        QuantizationType.PER_TENSOR_SYMMETRIC,
    ],
)
def test_another_type_is_refused_with_the_one_to_use(found: object) -> None:
    name = str(getattr(found, "value", found))
    with pytest.raises(
        ConfigurationError, match=f"quantization_type='per_channel_symmetric', not '{name}'"
    ):
        flag.check_neuron_config(neuron_config(quantization_type=found))
    flag.check_neuron_config(neuron_config(quantization_type=found, expert_wise_scale=False))
    flag.check_neuron_config(neuron_config(quantization_type=found, quantized=False))


def test_flag_without_quantization_is_warned_of_and_nothing_else_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        flag.warn_if_without_effect(neuron_config())
        flag.warn_if_without_effect(neuron_config(quantized=False, expert_wise_scale=False))
        assert caplog.messages == []
        flag.warn_if_without_effect(neuron_config(quantized=False))
    assert len(caplog.messages) == 1
    assert "expert_wise_scale has no effect" in caplog.messages[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"expert_wise_scale": False}, False),
        (
            {
                "expert_wise_scale": False,
                "quantization_type": "expert_wise_per_channel_symmetric",
            },
            True,
        ),
    ],
)
def test_scales_stay_apart_by_the_flag_or_by_upstreams_own_type(
    settings: dict[str, Any], expected: bool
) -> None:
    assert flag.fuses_expert_wise(neuron_config(**settings)) is expected


def test_exclusions_are_read_as_they_are() -> None:
    assert flag.exclusions(SimpleNamespace(modules_to_not_convert=["a", "b"])) == ("a", "b")
    assert flag.exclusions(SimpleNamespace(modules_to_not_convert=None)) == ()
    assert flag.exclusions(SimpleNamespace()) == ()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("f8e4m3", True),
        ("F8E5M2", True),
        (QuantizedDtype.F8E4M3, True),
        ("int8", False),
        (QuantizedDtype.INT8, False),
    ],
)
def test_fp8_by_name_or_by_nxds_own_type(dtype: object, expected: bool) -> None:
    assert flag.is_fp8(SimpleNamespace(quantization_dtype=dtype)) is expected
    assert not flag.is_fp8(SimpleNamespace())


@pytest.mark.parametrize(
    ("experts", "top_k", "smallest"), [(128, 8, 16), (8, 2, 4), (10, 3, 4), (9, 3, 3), (8, 8, 1)]
)
def test_expert_parallel_needs_the_smallest_batch_that_chooses_every_expert(
    experts: int, top_k: int, smallest: int
) -> None:
    model = model_config(num_experts=experts, num_experts_per_tok=top_k)
    check(neuron_config(moe_ep_degree=2, batch_size=smallest), model)
    check(neuron_config(moe_ep_degree=1, batch_size=1), model)
    if smallest == 1:
        return
    with pytest.raises(
        ConfigurationError,
        match=rf"degree 2\): token generation with {smallest - 1} x 1 tokens and {top_k} of "
        rf"{experts} .*batch_size of at least {smallest}, or moe_ep_degree=1",
    ):
        check(neuron_config(moe_ep_degree=2, batch_size=smallest - 1), model)


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_ep_degree": 2},
        {"moe_ep_degree": 2, "batch_size": 16, "tkg_batch_size": 15},
        {
            "moe_ep_degree": 2,
            "batch_size": 16,
            "chunked_prefill_config": SimpleNamespace(max_num_seqs=15),
        },
        {"moe_ep_degree": 2, "batch_size": 16, "token_generation_batches": [16, 15]},
        {
            "batch_size": 15,
            "hybrid_sharding_config": SimpleNamespace(moe_cte_ep_degree=1, moe_tkg_ep_degree=2),
        },
    ],
)
def test_wherever_the_degree_and_the_batch_are_set(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"token generation with 15? x 1 tokens"):
        check(neuron_config(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_ep_degree": None, "ep_degree": None, "batch_size": 1},
        {"moe_ep_degree": 2, "batch_size": 1, "tkg_batch_size": 16},
        {
            "moe_ep_degree": 2,
            "batch_size": 1,
            "chunked_prefill_config": SimpleNamespace(max_num_seqs=16),
        },
        {
            "moe_ep_degree": 2,
            "batch_size": 16,
            "chunked_prefill_config": SimpleNamespace(max_num_seqs=0),
        },
        # Hybrid sharding has a degree of its own for token generation.
        {
            "moe_ep_degree": 2,
            "batch_size": 1,
            "hybrid_sharding_config": SimpleNamespace(moe_cte_ep_degree=2, moe_tkg_ep_degree=1),
        },
    ],
)
def test_nothing_is_refused_that_would_run(settings: dict[str, Any]) -> None:
    check(neuron_config(**settings))


def test_contexts_shorter_than_a_block_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    check(neuron_config(moe_ep_degree=2, batch_size=16, max_context_length=3))
    assert "a smaller block_size" in caplog.text
    caplog.clear()
    check(neuron_config(moe_ep_degree=2, batch_size=16, max_context_length=4))
    assert caplog.text == ""


def test_model_whose_sizes_are_not_known_yet_is_let_through() -> None:
    unknown = SimpleNamespace(model_type="qwen3_moe")

    check(neuron_config(moe_ep_degree=2, batch_size=1), unknown)


@pytest.mark.parametrize("degree", [0, 2, 16])
def test_expert_parallelism_of_the_whole_model_is_refused(degree: int) -> None:
    with pytest.raises(ConfigurationError, match=f"ep_degree={degree}: .* or ep_degree=1"):
        check(neuron_config(ep_degree=degree, batch_size=128))


KERNEL = SimpleNamespace(logical_nc_config=2, use_torch_block_wise=False)
ONE_CORE = SimpleNamespace(logical_nc_config=1, use_torch_block_wise=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"blockwise_matmul_config": ONE_CORE},
            "needs blockwise_matmul_config.logical_nc_config=2, not 1",
        ),
        (
            {"logical_nc_config": 1, "blockwise_matmul_config": KERNEL},
            "needs logical_nc_config=2, not 1",
        ),
        ({"logical_nc_config": 1, "capacity_factor": 1.0}, "needs logical_nc_config=2, not 1"),
    ],
)
def test_another_logical_nc_is_refused_where_the_kernel_runs(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says) as refused:
        check(neuron_config(**settings), upstream=DEVICE)

    assert 'blockwise_matmul_config={"use_torch_block_wise": True}' in str(refused.value)
    check(neuron_config(**settings), upstream=CPU)


def test_release_without_the_way_round_the_kernel_is_not_told_of_it() -> None:
    with pytest.raises(ConfigurationError, match="needs logical_nc_config=2") as refused:
        check(neuron_config(logical_nc_config=1), upstream=BEFORE_SETTINGS)

    assert "use_torch_block_wise" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"logical_nc_config": 2, "blockwise_matmul_config": KERNEL},
        {"logical_nc_config": 1, "glu_mlp": False},
        {
            "logical_nc_config": 1,
            "blockwise_matmul_config": SimpleNamespace(
                logical_nc_config=1, use_torch_block_wise=True
            ),
        },
    ],
)
def test_logical_nc_is_free_where_the_kernel_does_not_run(settings: dict[str, Any]) -> None:
    check(neuron_config(**settings), upstream=DEVICE)
    if "blockwise_matmul_config" not in settings:
        check(neuron_config(**settings, capacity_factor=1.0), upstream=BEFORE_SETTINGS)


def test_number_of_cores_may_be_an_enumerations() -> None:
    two = enum.Enum("LogicalNC", {"TWO": 2}).TWO  # type: ignore[attr-defined]

    check(neuron_config(logical_nc_config=two), upstream=DEVICE)
    # As it comes back from NxDI's JSON.
    check(neuron_config(logical_nc_config=dict(vars(two))), upstream=DEVICE)
    with pytest.raises(ConfigurationError, match="needs logical_nc_config=2, not 1"):
        check(neuron_config(logical_nc_config={"_value_": 1}), upstream=DEVICE)


def test_family_is_known_by_model_type_or_by_the_module_of_the_config() -> None:
    assert flag.family_of_model(model_config(), BUILT_IN) is QWEN3_MOE
    assert flag.family_of_model(model_config(model_type="mixtral"), BUILT_IN) is MIXTRAL
    assert flag.family_of_model(model_config(model_type="qwen3"), BUILT_IN) is None
    assert flag.family_of_model(None, BUILT_IN) is None

    module = QWEN3_MOE.converter.partition(":")[0]
    own = type("Config", (), {"__module__": module})
    derived = type("Derived", (own,), {"__module__": "elsewhere"})
    assert flag.family_of_model(derived(), BUILT_IN) is QWEN3_MOE
    # A type that is named and that of another model decides.
    derived.model_type = "qwen3"  # type: ignore[attr-defined]
    assert flag.family_of_model(derived(), BUILT_IN) is None


@pytest.mark.parametrize("kind", ["dbrx", "gpt_oss"])
def test_model_that_cannot_have_it_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(ConfigurationError, match=f"not supported for '{kind}': .+"):
        flag.refuse_unsupported(neuron_config(), model_config(model_type=kind))
    for settings in ({"expert_wise_scale": False}, {"quantized": False}):
        flag.refuse_unsupported(neuron_config(**settings), model_config(model_type=kind))
    flag.refuse_unsupported(neuron_config(), model_config(model_type="qwen3"))
