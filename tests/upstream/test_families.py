"""Mixtral and Llama 4 through NxDI: what Qwen3 MoE does in ``test_end_to_end``, they do too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale import ConfigurationError, quantize_checkpoint
from tests.harness import models
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Family:
    """A model on disk, and what its names are.

    Attributes:
        folder: The Hugging Face model.
        layers: Its layers that have experts.
        experts: Path of the experts of one of them in the checkpoint.
        modules: Path of the same among NxDI's modules.
        rounding: Error of the unquantized model.
    """

    folder: Path
    layers: tuple[int, ...]
    experts: str
    modules: str
    rounding: float


@pytest.fixture(scope="module", params=["mixtral", "llama4"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param == "mixtral":
        return Family(
            models.save_mixtral(folder, spread=16.0),
            layers=(0, 1),
            experts="layers.{}.block_sparse_moe.experts",
            modules="layers.{}.mlp.expert_mlps",
            rounding=1e-5,
        )
    return Family(
        models.save_llama4(folder, spread=16.0),
        layers=(1, 3),
        experts="layers.{}.feed_forward.experts",
        modules="layers.{}.feed_forward.moe.expert_mlps",
        # From 0.6 on NxDI's MoE block normalizes its input, which is normalized here already.
        rounding=1e-4,
    )


@pytest.fixture(scope="module")
def fp8(nxdi: Any, family: Family) -> dict[str, Any]:
    """Settings with which a model is loaded from what our quantizer made."""
    quantize_checkpoint(family.folder, family.folder.parent / "fp8")
    return {**nxdi.FP8, "quantized_checkpoints_path": str(family.folder.parent / "fp8")}


def experts_of(loaded: Any, family: Family, layer: int) -> Any:
    return loaded.module.get_submodule(f"{family.modules.format(layer)}.mlp_op")


@pytest.fixture
def errors_of(nxdi: Any, target: Target, family: Family) -> Callable[[Any, float], list[float]]:
    """Assert that nothing of a loaded model is further off; the errors of its MoE blocks."""

    def errors(loaded: Any, within: float) -> list[float]:
        if target.is_double and family.folder.name == "llama4":
            # Its layers have experts and nothing else.
            found: list[float] = nxdi.moe_errors(family.folder, loaded)
            assert max(found) < within
            return found
        return list(nxdi.assert_right(family.folder, loaded, within=within).moe)

    return errors


def test_unquantized_model_agrees_with_hugging_face(
    nxdi: Any, family: Family, errors_of: Callable[[Any, float], list[float]]
) -> None:
    errors = errors_of(nxdi.load(family.folder), family.rounding)

    assert len(errors) == len(family.layers)


def test_expert_wise_scales_keep_the_model(
    nxdi: Any,
    family: Family,
    fp8: dict[str, Any],
    errors_of: Callable[[Any, float], list[float]],
    record_property: Record,
) -> None:
    loaded = nxdi.load(family.folder, **fp8, expert_wise_scale=True)

    errors = errors_of(loaded, 0.08)
    record_property("MoE error, expert-wise", max(errors))
    assert family.rounding < max(errors)
    for layer in family.layers:
        experts = experts_of(loaded, family, layer)
        gate_up = (models.EXPERTS, 1, 2 * models.MOE_INTERMEDIATE_SIZE)
        assert experts.gate_up_proj.scale.shape == gate_up
        assert experts.down_proj.scale.shape == (models.EXPERTS, 1, models.HIDDEN_SIZE)
        assert experts.gate_up_proj.weight.dtype == torch.float8_e4m3fn
    attention = loaded.module.layers[0].self_attn.qkv_proj.q_proj
    assert attention.quantization_type.value == "per_channel_symmetric"


def test_averaged_scales_lose_the_model(
    nxdi: Any, family: Family, fp8: dict[str, Any], record_property: Record
) -> None:
    expert_wise = nxdi.moe_errors(
        family.folder, nxdi.load(family.folder, **fp8, expert_wise_scale=True)
    )
    loaded = nxdi.load(family.folder, **fp8)

    errors = nxdi.moe_errors(family.folder, loaded)
    record_property("MoE error, averaged", min(errors))
    assert min(errors) > 5 * max(expert_wise)
    scale = experts_of(loaded, family, family.layers[0]).down_proj.scale
    assert scale.shape == (1, 1, models.HIDDEN_SIZE)


@pytest.mark.parametrize("naming", ["experts", "modules"])
def test_one_layers_experts_stay_in_full_precision(
    nxdi: Any,
    family: Family,
    fp8: dict[str, Any],
    errors_of: Callable[[Any, float], list[float]],
    tmp_path: Path,
    naming: str,
) -> None:
    first, second = family.layers
    name = getattr(family, naming).format(first)
    quantize_checkpoint(family.folder, tmp_path / "fp8", modules_to_not_convert=[name])
    settings = {
        **fp8,
        "quantized_checkpoints_path": str(tmp_path / "fp8"),
        "modules_to_not_convert": [name],
    }

    loaded = nxdi.load(family.folder, **settings, expert_wise_scale=True)

    errors = errors_of(loaded, 0.08)
    assert errors[0] < family.rounding < errors[1] < 0.06
    assert not hasattr(experts_of(loaded, family, first).down_proj, "scale")
    assert hasattr(experts_of(loaded, family, second).down_proj, "scale")


def test_exclusion_that_the_checkpoint_does_not_have_is_refused(
    nxdi: Any, family: Family, fp8: dict[str, Any]
) -> None:
    name = family.modules.format(family.layers[0])

    with pytest.raises(ConfigurationError, match=r"quantized in the checkpoint"):
        nxdi.load(family.folder, **fp8, expert_wise_scale=True, modules_to_not_convert=[name])


def test_mixtral_from_nxdis_own_step_equals_ours(nxdi: Any, tmp_path: Path) -> None:
    folder = models.save_mixtral(tmp_path / "mixtral", spread=16.0)
    fp8 = nxdi.quantize(folder, tmp_path / "nxdi", not_converted=["block_sparse_moe.gate"])
    quantize_checkpoint(folder, tmp_path / "ours")
    ours = {**fp8, "quantized_checkpoints_path": str(tmp_path / "ours")}

    expected = nxdi.convert(folder, **fp8, expert_wise_scale=True)
    actual = nxdi.convert(folder, **ours, expert_wise_scale=True)

    assert nxdi.different_tensors(actual, expected) == []
