"""The scales of a layer's experts: what is taken, and every refusal, which names the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nxdi_expertscale import CheckpointError
from nxdi_expertscale.families.built_in import MIXTRAL, QWEN3_MOE
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.loading import expert_scales
from nxdi_expertscale.loading.fused_sample import COMPARED_INPUTS, FusedSample, take_now
from nxdi_expertscale.numerics import fp8

EXPERTS, INTERMEDIATE, HIDDEN = 4, 4, 6
StateDict = dict[str, torch.Tensor]


def layer_of(family: MoEFamily, layer: int = 0) -> StateDict:
    """A quantized layer, with the names that it has before NxDI fuses it."""
    generator = torch.Generator().manual_seed(layer)
    tensors: StateDict = {}
    for expert in range(EXPERTS):
        for name in family.projections:
            shape = (HIDDEN, INTERMEDIATE) if name == family.down else (INTERMEDIATE, HIDDEN)
            weight = torch.randn(shape, generator=generator) * 2.0**expert
            quantized, scale = fp8.quantize_per_channel(weight)
            tensors[family.expert_key(layer, expert, name)] = quantized
            tensors[family.expert_key(layer, expert, name, "scale")] = scale
    return tensors


def collect(tensors: StateDict, family: MoEFamily = QWEN3_MOE) -> expert_scales.LayerScales:
    """The scales of the layer, with samples of its weights."""
    found = expert_scales.collect(tensors, family, 0, EXPERTS)
    assert found is not None
    take_now(found.samplers, tensors)
    return found


def fused_weights(tensors: StateDict, family: MoEFamily = QWEN3_MOE, pad: int = 0) -> StateDict:
    """The experts' weights as NxDI fuses them, ``[E, in, out]``, the intermediate axis padded."""

    def stacked(name: str) -> torch.Tensor:
        weights = [tensors[family.expert_key(0, e, name)].float().T for e in range(EXPERTS)]
        return torch.stack(weights)

    def padded(weight: torch.Tensor, amounts: tuple[int, ...]) -> torch.Tensor:
        return torch.nn.functional.pad(weight, amounts)

    gate, up, down = (stacked(name) for name in family.projections)
    gate_up = torch.cat([padded(gate, (0, pad)), padded(up, (0, pad))], dim=2)
    return {
        "gate_up_proj": gate_up.to(torch.float8_e4m3fn),
        "down_proj": padded(down, (0, 0, 0, pad)).to(torch.float8_e4m3fn),
    }


@pytest.mark.parametrize("family", [QWEN3_MOE, MIXTRAL], ids=lambda family: family.name)
def test_scales_are_fused_as_the_weights_are(family: MoEFamily) -> None:
    tensors = layer_of(family)
    before = dict(tensors)

    found = collect(tensors, family)

    gate_up, down = found.fused["gate_up_proj"], found.fused["down_proj"]
    assert (gate_up.shape, gate_up.dtype) == ((EXPERTS, 1, 2 * INTERMEDIATE), torch.float32)
    assert (down.shape, down.dtype) == ((EXPERTS, 1, HIDDEN), torch.float32)
    for expert in range(EXPERTS):
        gate, up, last = (
            tensors[family.expert_key(0, expert, name, "scale")].flatten()
            for name in family.projections
        )
        assert torch.equal(gate_up[expert, 0], torch.cat([gate, up]))
        assert torch.equal(down[expert, 0], last)
    assert set(found.consumed) == {key for key in tensors if key.endswith(".scale")}
    assert len(found.consumed) == len(set(found.consumed))
    assert (found.layer, tensors.keys()) == (0, before.keys())


def test_layer_without_scales_is_left_alone() -> None:
    tensors = {
        key: weight.float()
        for key, weight in layer_of(QWEN3_MOE).items()
        if key.endswith(".weight")
    }

    assert expert_scales.collect(tensors, QWEN3_MOE, 0, EXPERTS) is None
    assert expert_scales.collect({}, QWEN3_MOE, 0, EXPERTS) is None


def test_another_layers_scales_are_not_taken() -> None:
    tensors = layer_of(QWEN3_MOE, layer=1)

    assert expert_scales.collect(tensors, QWEN3_MOE, 0, EXPERTS) is None


SCALE, WEIGHT = "layers.0.mlp.experts.1.up_proj.scale", "layers.0.mlp.experts.1.up_proj.weight"
DOWN = "layers.0.mlp.experts.2.down_proj"


def drop(key: str) -> Callable[[StateDict], Any]:
    return lambda tensors: tensors.pop(key)


def put(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[StateDict], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


REFUSED: dict[str, tuple[Callable[[StateDict], Any], str, str]] = {
    "scale missing": (drop(SCALE), SCALE, "missing"),
    "first scale missing": (
        drop("layers.0.mlp.experts.0.gate_proj.scale"),
        "layers.0.mlp.experts.0.gate_proj.scale",
        "missing",
    ),
    "weight missing": (drop(WEIGHT), WEIGHT, "missing"),
    "first weight missing": (
        drop("layers.0.mlp.experts.0.gate_proj.weight"),
        "layers.0.mlp.experts.0.gate_proj.weight",
        "missing",
    ),
    "last scale missing": (drop(f"{DOWN}.scale"), f"{DOWN}.scale", "missing"),
    "weight unquantized": (put(WEIGHT, torch.Tensor.float), WEIGHT, "dtype is torch.float32"),
    "weight of another dtype": (
        put(WEIGHT, lambda weight: weight.view(torch.int8)),
        WEIGHT,
        "dtype is torch.int8",
    ),
    "weight transposed": (put(WEIGHT, torch.Tensor.t), WEIGHT, "shape is [6, 4]"),
    "down as gate": (put(f"{DOWN}.weight", torch.Tensor.t), f"{DOWN}.weight", "shape is [4, 6]"),
    "scale of another length": (put(SCALE, lambda s: s[:-1]), SCALE, "shape [3, 1]"),
    "scale transposed": (put(SCALE, torch.Tensor.t), SCALE, "shape [1, 4]"),
    "scale of integers": (put(SCALE, torch.Tensor.int), SCALE, "not torch.int32"),
    "scale zero": (put(SCALE, torch.zeros_like), SCALE, "finite and positive"),
    "scale negative": (put(SCALE, torch.neg), SCALE, "finite and positive"),
    "scale infinite": (put(SCALE, lambda s: s / 0), SCALE, "finite and positive"),
    "scale NaN": (put(f"{DOWN}.scale", lambda s: s * torch.nan), f"{DOWN}.scale", "finite"),
    "an expert too many": (
        lambda tensors: tensors.update(
            {"layers.0.mlp.experts.4.gate_proj.weight": tensors[WEIGHT]}
        ),
        "layers.0.mlp.experts.4.gate_proj.weight",
        "the model's config says 4 experts",
    ),
    "quantized without any scale": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("scale")],
        "layers.0.mlp.experts.0.gate_proj.scale",
        "missing, and the weight is torch.float8_e4m3fn",
    ),
    "one quantized without any scale": (
        lambda tensors: [
            tensors.pop(key) if key.endswith("scale") else tensors.update({key: weight.float()})
            for key, weight in list(tensors.items())
            if key != WEIGHT
        ],
        SCALE,
        "missing",
    ),
    "block scales": (
        lambda tensors: [
            tensors.update({f"{key.removesuffix('scale')}weight_scale_inv": tensors.pop(key)})
            for key in list(tensors)
            if key.endswith("scale")
        ],
        "layers.0.mlp.experts.0.gate_proj.weight_scale_inv",
        "block scales",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_layer_is_refused_naming_the_tensor_and_what_to_do(name: str) -> None:
    change, tensor, says = REFUSED[name]
    tensors = layer_of(QWEN3_MOE)
    change(tensors)

    with pytest.raises(CheckpointError) as refused:
        expert_scales.collect(tensors, QWEN3_MOE, 0, EXPERTS)

    message = str(refused.value)
    assert message.startswith(f"{tensor}: ")
    assert says in message
    assert "nxdi-expertscale quantize" in message or "config says" in message
    assert "\n" not in message


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("fused", ["gate_up_proj", "down_proj"])
def test_fused_weight_is_known_padded_or_not(pad: int, fused: str) -> None:
    tensors = layer_of(QWEN3_MOE)
    found = collect(tensors)

    assert found.matches_layout(fused, fused_weights(tensors, pad=pad)[fused])


def swapped(weight: torch.Tensor, axis: int, one: int, other: int) -> torch.Tensor:
    """A weight with two of its places along an axis exchanged."""
    order = list(range(weight.shape[axis]))
    order[one], order[other] = other, one
    return weight.index_select(axis, torch.tensor(order))


def with_channels_swapped(weight: torch.Tensor, expert: int) -> torch.Tensor:
    changed = weight.clone()
    changed[expert] = swapped(weight[expert], 1, 0, 1)
    return changed


OTHERWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "experts in another order": lambda weight: weight.flip(0),
    "two experts in the middle exchanged": lambda weight: swapped(weight, 0, 1, 2),
    "another first expert": lambda weight: torch.cat([weight[1:2], weight[1:]]),
    "another last expert": lambda weight: torch.cat([weight[:-1], weight[:1]]),
    "fewer experts": lambda weight: weight[1:],
    "channels in another order": lambda weight: weight.flip(2),
    "two channels of the first expert exchanged": lambda w: with_channels_swapped(w, 0),
    "two channels of an expert in the middle exchanged": lambda w: with_channels_swapped(w, 1),
    "two channels of the last expert exchanged": lambda w: with_channels_swapped(w, EXPERTS - 1),
    "gate and up interleaved": lambda weight: weight.unflatten(2, (2, -1)).mT.flatten(2),
    "up before gate": lambda weight: weight.roll(INTERMEDIATE, 2),
    "inputs in another order": lambda weight: weight.flip(1),
    "not transposed": lambda weight: weight.mT,
    "an odd width": lambda weight: weight[:, :, :-1],
    "fewer inputs": lambda weight: weight[:, :-1],
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_weight_fused_in_another_way_is_told(name: str) -> None:
    tensors = layer_of(QWEN3_MOE)
    found = collect(tensors)
    weight = fused_weights(tensors)["gate_up_proj"]

    changed = OTHERWISE[name](weight.view(torch.uint8)).contiguous().view(weight.dtype)

    assert not found.matches_layout("gate_up_proj", changed)


def test_weight_of_another_dtype_is_told() -> None:
    tensors = layer_of(QWEN3_MOE)
    weight = fused_weights(tensors)["gate_up_proj"]

    assert not collect(tensors).matches_layout("gate_up_proj", weight.to(torch.bfloat16))


def sample_of(weights: list[torch.Tensor]) -> FusedSample:
    """A sample of experts of one projection each."""
    sample = FusedSample.of(len(weights), 1, weights[0])
    for expert, weight in enumerate(weights):
        sample.take(expert, 0, weight.T)
    return sample


def test_sample_outlives_the_weights_and_is_a_small_part_of_them() -> None:
    weights = [torch.randint(0, 255, (8, 512), dtype=torch.uint8) for _ in range(5)]
    sample = sample_of(weights)
    fused = torch.stack([weight.T.clone() for weight in weights])
    for weight in weights:
        weight.zero_()

    assert sample.is_in(fused)
    assert sample.values.nbytes == 5 * 8 * COMPARED_INPUTS
    seen = {
        position
        for position in range(512)
        if not sample.is_in(fused.index_fill(1, torch.tensor([position]), 0))
    }
    assert seen == {127 * expert + number for expert in range(5) for number in (0, 1)}
    assert len(seen) == 5 * COMPARED_INPUTS


def test_weights_of_fewer_inputs_than_are_compared_are_compared_whole() -> None:
    weights = [torch.randint(0, 255, (6, 2), dtype=torch.uint8) for _ in range(2)]
    fused = torch.stack([weight.T for weight in weights])

    assert sample_of(weights).is_in(fused)
    assert not sample_of(weights).is_in(fused.flip(1))


def test_what_is_taken_first_counts() -> None:
    weights = [torch.randint(1, 255, (6, 8), dtype=torch.uint8) for _ in range(2)]
    sample = sample_of(weights)

    sample.take(1, 0, torch.zeros(8, 6, dtype=torch.uint8))

    assert sample.is_in(torch.stack([weight.T for weight in weights]))


def test_weight_of_which_an_expert_was_never_read_is_told() -> None:
    weights = [torch.zeros(6, 8, dtype=torch.uint8) for _ in range(3)]
    sample = FusedSample.of(3, 1, weights[0])
    sample.values.zero_()
    for expert in (0, 2):
        sample.take(expert, 0, weights[expert].T)

    assert not sample.is_in(torch.zeros(3, 8, 6, dtype=torch.uint8))
