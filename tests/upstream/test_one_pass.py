"""Converting in one pass: what NxDI's own converter makes, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.loading import put_off
from tests.harness import models

pytestmark = pytest.mark.usefixtures("active")

MODELS = {
    "qwen3_moe": models.save_qwen3_moe,
    "mixtral": models.save_mixtral,
    "llama4": models.save_llama4,
}
TRANSPOSING = ("qwen3_moe", "mixtral")
"""The families whose converters transpose the experts of a checkpoint one by one."""


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def original(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[family](tmp_path_factory.mktemp("models") / family, spread=16.0)


@pytest.fixture(scope="module")
def fp8(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "fp8"
    quantize_checkpoint(original, folder)
    return folder


@pytest.fixture(params=["fp8", "fp8 averaged", "bfloat16", "float32"])
def settings(request: pytest.FixtureRequest, nxdi: Any, fp8: Path) -> dict[str, Any]:
    if not request.param.startswith("fp8"):
        return {"torch_dtype": getattr(torch, request.param)}
    return {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(fp8),
        "expert_wise_scale": request.param == "fp8",
    }


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the weights that were transposed in one pass."""
    found: list[tuple[int, ...]] = []

    def copy_transposed(weight: torch.Tensor, out: torch.Tensor) -> None:
        found.append(tuple(weight.shape))
        out.copy_(weight.T)

    with monkeypatch.context() as patch:
        patch.setattr(put_off, "copy_transposed", copy_transposed)
        yield found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        type(one) is type(other)
        and one.dtype == other.dtype
        and one.stride() == other.stride()
        and torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (one, other)))
    )


def test_state_dict_is_that_of_nxdi_alone(
    nxdi: Any,
    original: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = nxdi.convert(original, **settings)

    monkeypatch.setenv(put_off.VARIABLE, "0")
    alone = nxdi.convert(original, **settings)
    assert found.keys() == alone.keys()
    assert [name for name, tensor in found.items() if not same_bits(tensor, alone[name])] == []


def test_each_expert_is_transposed_in_one_pass(
    nxdi: Any,
    family: str,
    original: Path,
    settings: dict[str, Any],
    in_one_pass: list[tuple[int, ...]],
) -> None:
    nxdi.convert(original, **settings)

    experts = 3 * models.EXPERTS * models.LAYERS if family in TRANSPOSING else 0
    assert len(in_one_pass) == experts


def test_variable_leaves_the_converter_alone(
    nxdi: Any,
    original: Path,
    settings: dict[str, Any],
    in_one_pass: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(put_off.VARIABLE, "0")

    nxdi.convert(original, **settings)

    assert in_one_pass == []
