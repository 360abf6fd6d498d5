"""Whether a state dict fills a model, on modules that say what NxD's say of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nxdi_expertscale.loading import completeness

FP8 = torch.float8_e4m3fn
RANKS = 2


def cut(parameter: nn.Parameter, dim: int) -> nn.Parameter:
    """Let a parameter say that it is a rank's part."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim, parameter.num_partitions = dim, RANKS
    return parameter


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class Quantized(nn.Module):
    """``[out / ranks, in]`` with a scale for each output."""

    def __init__(self, out: int, inputs: int) -> None:
        super().__init__()
        self.weight = cut(empty(out // RANKS, inputs, dtype=FP8), 0)
        self.scale = cut(empty(out // RANKS, 1), 0)


class QKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = Quantized(8, 4)


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.past_key_values = nn.ParameterList([empty(1, 2)])


class Rank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rank = empty(1, dtype=torch.int32)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = QKV()
        self.rank_util = Rank()


class Experts(nn.Module):
    """Half of four experts, whose other half is on another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = empty(2, 4, 6, dtype=FP8), empty(2, 1, 6)
        for parameter in (self.weight, self.scale):
            parameter.expert_model_parallel = True


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.experts = Experts()
        self.router = nn.Linear(4, 4)
        # A second name of the same module, as fused token generation has it.
        self.fused = nn.ModuleDict({"router": self.router})
        self.register_buffer("correction", torch.zeros(4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.LayerNorm(4, bias=False)
        self.kv_mgr = Cache()


@pytest.fixture
def model() -> nn.Module:
    with torch.device("meta"):
        return Model()


@pytest.fixture
def state_dict() -> dict[str, torch.Tensor]:
    """What preshard hooks leave, as NxDI's do: attention's weights under two names."""
    found: dict[str, Any] = {"norm.weight": torch.ones(4)}
    for layer in range(2):
        path = f"layers.{layer}"
        for attention in (f"{path}.self_attn.q_proj", f"{path}.self_attn.qkv_proj.q_proj"):
            found |= {
                f"{attention}.weight": torch.zeros(8, 4).to(FP8),
                f"{attention}.scale": torch.ones(8, 1),
            }
        found |= {
            f"{path}.experts.weight": torch.zeros(4, 4, 6).to(FP8),
            f"{path}.experts.scale": torch.ones(4, 1, 6),
            f"{path}.router.weight": torch.zeros(4, 4),
            f"{path}.router.bias": torch.zeros(4),
            f"{path}.correction": torch.zeros(4),
        }
    return found


def only_fault(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> completeness.Fault:
    (fault,) = completeness.find_faults(model, state_dict)
    return fault


def test_state_dict_that_fills_a_model_has_no_fault(model: Any, state_dict: Any) -> None:
    assert completeness.find_faults(model, state_dict) == []


def test_values_are_not_looked_at(model: Any, state_dict: Any) -> None:
    without_values = {name: tensor.to("meta") for name, tensor in state_dict.items()}

    assert completeness.find_faults(model, without_values) == []


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.router.bias", "layers.0.correction"])
def test_parameter_without_a_tensor(model: Any, state_dict: Any, name: str) -> None:
    del state_dict[name]

    fault = only_fault(model, state_dict)

    assert fault.name == name
    assert "would run with what it was initialised with" in str(fault)


def test_tensor_under_another_name_is_named_beside_the_parameter_that_lacks_it(
    model: Any, state_dict: Any
) -> None:
    state_dict["layers.0.router.e_score_bias"] = state_dict.pop("layers.0.router.bias")

    missing, left_over = completeness.find_faults(model, state_dict)

    assert missing.name == "layers.0.router.bias"
    assert "missing (there is layers.0.router.e_score_bias)" in missing.problem
    assert left_over.name == "layers.0.router.e_score_bias"
    assert "layers.0.router is a Linear" in left_over.problem


@pytest.mark.parametrize("name", ["layers.0.fused.router.weight", "layers.0.router.weight"])
def test_parameter_with_two_names_needs_one_of_them(model: Any, state_dict: Any, name: str) -> None:
    state_dict[name] = state_dict.pop("layers.0.router.weight")

    assert completeness.find_faults(model, state_dict) == []


def test_renamed_scale_is_missing_and_left_over(model: Any, state_dict: Any) -> None:
    state_dict["layers.0.experts.weight_scale"] = state_dict.pop("layers.0.experts.scale")

    missing, left_over = completeness.find_faults(model, state_dict)

    assert missing.name == "layers.0.experts.scale"
    assert "cannot read layers.0.experts.weight without it" in missing.problem
    assert left_over.name == "layers.0.experts.weight_scale"
    assert "no module applies this scale" in left_over.problem


def test_quantized_tensor_for_a_module_that_nxdi_has_not_converted(
    model: Any, state_dict: Any
) -> None:
    state_dict["layers.1.router.weight"] = torch.zeros(4, 4).to(FP8)
    state_dict["layers.1.router.scale"] = torch.ones(4, 1)

    fault, unused = completeness.find_faults(model, state_dict)

    assert fault.name == "layers.1.router.weight"
    assert "(Linear) reads that as plain numbers, without a scale" in fault.problem
    assert "--modules-to-not-convert router" in fault.remedy
    assert unused.name == "layers.1.router.scale"


def test_numbers_for_a_quantized_module(model: Any, state_dict: Any) -> None:
    state_dict["layers.0.experts.weight"] = torch.zeros(4, 4, 6)

    fault = only_fault(model, state_dict)

    assert fault.name == "layers.0.experts.weight"
    assert "it is torch.float32, and its module (Experts) is one of torch.float8" in fault.problem
    assert "set modules_to_not_convert to what the checkpoint was made with" in fault.remedy


def test_another_quantized_dtype(model: Any, state_dict: Any) -> None:
    state_dict["layers.0.experts.weight"] = torch.zeros(4, 4, 6, dtype=torch.int8)

    assert "it is torch.int8" in only_fault(model, state_dict).problem


@pytest.mark.parametrize(
    ("name", "found", "takes"),
    [
        ("norm.weight", (5,), "[4]"),
        # A rank's part is not the whole.
        ("layers.0.self_attn.qkv_proj.q_proj.scale", (4, 1), "[8, 1]"),
        ("layers.0.experts.scale", (3, 1, 6), "[2, 1, 6]"),
        ("layers.0.experts.scale", (4, 1, 12), "[2, 1, 6]"),
        ("layers.0.experts.scale", (4, 6), "[2, 1, 6]"),
    ],
)
def test_wrong_shape(model: Any, state_dict: Any, name: str, found: Any, takes: str) -> None:
    state_dict[name] = torch.ones(found)

    fault = only_fault(model, state_dict)

    assert fault.name == name
    assert f"its shape is {list(found)}" in fault.problem
    assert f"takes {takes}" in fault.problem


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("layers.0.self_attn.q_proj.bias", "the model would compute without it"),
        ("layers.1.shared_expert.up_proj.weight", "the model would compute without it"),
        ("norm.scale", "no module applies this scale"),
    ],
)
def test_tensor_that_no_parameter_takes(
    model: Any, state_dict: Any, name: str, problem: str
) -> None:
    state_dict[name] = torch.ones(8)

    fault = only_fault(model, state_dict)

    assert fault.name == name
    assert problem in fault.problem


def test_quantized_tensor_that_no_parameter_takes(model: Any, state_dict: Any) -> None:
    state_dict["layers.1.shared.weight"] = torch.ones(8).to(FP8)

    assert "it is torch.float8_e4m3fn, and no module takes it" in str(only_fault(model, state_dict))


@pytest.mark.parametrize(
    "name",
    [
        "vision_model.layers.0.fc1.weight",
        "layers.2.experts.weight",
        "mtp.layers.0.weight",
        "layers.0.self_attn.rotary_emb.inv_freq",
        "layers.0.self_attn.qkv_proj.q_proj.input_scale",
        "layers.0.self_attn.k_scale",
        "layers.0.experts.spmd_rank.rank",
    ],
)
def test_what_the_model_does_not_have_or_need_is_no_fault(
    model: Any, state_dict: Any, name: str
) -> None:
    state_dict[name] = torch.ones(8)

    assert completeness.find_faults(model, state_dict) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensor_that_a_converter_has_copied_to_another_name(
    model: Any, state_dict: Any, device: str
) -> None:
    state_dict["layers.0.router.offset"] = state_dict["layers.0.router.bias"].clone()
    state_dict = {name: tensor.to(device) for name, tensor in state_dict.items()}

    assert completeness.find_faults(model, state_dict) == []


def test_copy_stands_for_one_tensor_and_only_for_its_equal(model: Any, state_dict: Any) -> None:
    state_dict["layers.0.router.bias"] = torch.rand(4)
    names = ["layers.0.router.offset", "layers.0.router.shift", "layers.1.router.offset"]
    for name in names[:2]:
        state_dict[name] = state_dict["layers.0.router.bias"].clone()
    state_dict[names[2]] = torch.ones(4)

    faults = completeness.find_faults(model, state_dict)

    assert [fault.name for fault in faults] == names[1:]


def test_state_that_the_model_writes_itself(model: Any, state_dict: Any) -> None:
    model.layers[0].recurrent_state = empty(3, 3)

    assert only_fault(model, state_dict).name == "layers.0.recurrent_state"
    states = [model.layers[0].recurrent_state]
    assert completeness.find_faults(model, state_dict, states) == []


def test_layers_that_adapters_wrap_are_those_that_they_wrap(model: Any, state_dict: Any) -> None:
    """NxDI renames the tensors after the preshard hooks."""
    adapted = nn.Module()
    adapted.base_layer = model.layers[0].router
    adapted.lora_A = nn.Linear(4, 2)
    model.layers[0].router = adapted
    del model.layers[0].fused

    assert completeness.find_faults(model, state_dict) == []


def test_parts_of_fused_speculation_are_models_of_their_own(model: Any, state_dict: Any) -> None:
    both = nn.ModuleDict({"draft_model": model, "target_model": model})
    prefixed = {f"draft_model.{name}": tensor for name, tensor in state_dict.items()}
    prefixed["draft_model.mtp.weight"] = torch.ones(2)

    assert completeness.find_faults(both, prefixed) == []
    del prefixed["draft_model.norm.weight"]
    assert only_fault(both, prefixed).name == "draft_model.norm.weight"


def test_one_line_tells_of_all_faults(model: Any, state_dict: Any) -> None:
    for layer in range(2):
        del state_dict[f"layers.{layer}.router.weight"]
    del state_dict["norm.weight"]

    line = completeness.describe(completeness.find_faults(model, state_dict))

    assert line.startswith("layers.0.router.weight: missing")
    assert line.endswith("(also: layers.1.router.weight, norm.weight)")
    assert "\n" not in line


def test_one_line_counts_the_layers_with_the_same_fault(model: Any, state_dict: Any) -> None:
    faults = [completeness.Fault(f"layers.{n}.a.weight", "gone", "go") for n in range(48)]
    faults += [completeness.Fault(f"{name}.weight", "gone", "go") for name in "bcdef"]

    line = completeness.describe(faults)

    assert line == (
        "layers.0.a.weight: gone; go (also: 47 like layers.1.a.weight, b.weight, c.weight, "
        "d.weight and 2 more kinds)"
    )
