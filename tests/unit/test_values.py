"""Every FP8 weight is within Neuron's range and every scale a positive number, or it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nxdi_expertscale import CheckpointError
from nxdi_expertscale.loading import values
from nxdi_expertscale.numerics import fp8

StateDict = dict[str, torch.Tensor]
Q, HEAD = "layers.0.self_attn.q_proj", "lm_head"
EXPERT = "layers.0.mlp.experts.3.up_proj"


def state_dict() -> StateDict:
    found: StateDict = {"norm.weight": torch.full((4,), -1.0)}
    for number, name in enumerate((Q, EXPERT, HEAD)):
        weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
        found[f"{name}.weight"], found[f"{name}.scale"] = fp8.quantize_per_channel(weight)
    return found


def beyond(weight: torch.Tensor, byte: int) -> torch.Tensor:
    bytes_ = weight.view(torch.uint8).clone()
    bytes_[-1, -1] = byte
    return bytes_.view(torch.float8_e4m3fn)


def test_a_good_state_dict_is_taken() -> None:
    values.check_values(state_dict())
    values.check_values({})


@pytest.mark.parametrize("byte", [0x78, 0x7F, 0xF8, 0xFE])
@pytest.mark.parametrize("name", [Q, EXPERT, HEAD])
def test_fp8_beyond_neurons_range_is_refused_wherever_it_is(name: str, byte: int) -> None:
    found = state_dict()
    found[f"{name}.weight"] = beyond(found[f"{name}.weight"], byte)

    with pytest.raises(CheckpointError) as refused:
        values.check_values(found)

    message = str(refused.value)
    assert message.startswith(f"{name}.weight: holds FP8 values beyond ±240")
    assert message.endswith("make the checkpoint again with 'nxdi-expertscale quantize'")
    values.check_values(found, known=[f"{name}.weight"])


INVALID: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero": lambda scale: scale.index_fill(0, torch.tensor([2]), 0.0),
    "negative": lambda scale: scale.index_fill(0, torch.tensor([5]), -1e-3),
    "infinite": lambda scale: scale.index_fill(0, torch.tensor([0]), torch.inf),
    "NaN": lambda scale: scale.index_fill(0, torch.tensor([3]), torch.nan),
}


@pytest.mark.parametrize("how", INVALID)
@pytest.mark.parametrize("name", [Q, EXPERT, HEAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_is_no_positive_number_is_refused_wherever_it_is(
    name: str, how: str, dtype: torch.dtype
) -> None:
    found = state_dict()
    found[f"{name}.scale"] = INVALID[how](found[f"{name}.scale"]).to(dtype)

    with pytest.raises(CheckpointError, match=f"^{name}.scale: a scale must be finite and positi"):
        values.check_values(found)


@pytest.mark.parametrize("scale", ["weight_scale", "input_scale", "weight_scale_inv"])
def test_scales_by_other_names_are_judged_too(scale: str) -> None:
    with pytest.raises(CheckpointError, match=f"^{HEAD}.{scale}: a scale must be finite"):
        values.check_values({**state_dict(), f"{HEAD}.{scale}": torch.zeros(1)})
    values.check_values(
        {**state_dict(), f"{HEAD}.{scale}": torch.zeros(1)}, known=[f"{HEAD}.{scale}"]
    )


def test_what_is_no_scale_of_a_quantized_weight_may_be_any_number() -> None:
    values.check_values(
        {
            "router.scale": torch.tensor([-1.0]),
            "router.weight": torch.ones(2, 2),
            "layer_scale": torch.tensor([0.0]),
        }
    )


def test_int8_and_e5m2_have_no_range_to_exceed() -> None:
    for dtype in (torch.int8, torch.float8_e5m2):
        values.check_values({"a.weight": torch.full((2, 2), 100.0).to(dtype)})


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_of_many_is_named_whoever_finds_it(workers: int) -> None:
    found: StateDict = {}
    for number in range(20):
        found[f"w{number}.weight"] = torch.zeros(1, 4).to(torch.float8_e4m3fn)
        found[f"w{number}.scale"] = torch.ones(1, 1)
    for number in (7, 8, 19):
        found[f"w{number}.weight"] = beyond(found[f"w{number}.weight"], 0x7E)

    with pytest.raises(CheckpointError, match=r"^w7\.weight"):
        values.check_values(found, workers=workers, chunk_bytes=10)
    found["w11.scale"] = found["w17.scale"] = torch.zeros(1, 1)
    with pytest.raises(CheckpointError, match=r"^w11\.scale"):
        values.check_values(found, workers=workers)


def test_torchs_threads_are_as_they_were() -> None:
    before: Any = torch.get_num_threads()

    values.check_values(state_dict(), workers=2)

    assert torch.get_num_threads() == before
