"""Scales of the layers beside the experts, in the one form that NxDI loads."""

from __future__ import annotations

import pytest
import torch

from nxdi_expertscale import CheckpointError
from nxdi_expertscale.families.built_in import QWEN3_MOE
from nxdi_expertscale.loading.channel_scales import per_channel_scales

OUT, IN = 4, 3
QUERY = "layers.0.self_attn.q_proj"


def state_dict(scale: torch.Tensor, path: str = QUERY) -> dict[str, torch.Tensor]:
    weight = torch.ones(OUT, IN).to(torch.float8_e4m3fn)
    return {f"{path}.weight": weight, f"{path}.scale": scale, "norm.weight": torch.ones(IN)}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_holds_for_every_channel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = per_channel_scales(state_dict(torch.full(shape, 0.5, dtype=dtype)), QWEN3_MOE)

    assert found.keys() == {f"{QUERY}.scale"}
    assert torch.equal(found[f"{QUERY}.scale"], torch.full((OUT, 1), 0.5))
    assert found[f"{QUERY}.scale"].is_contiguous()


def test_scales_in_a_row_are_put_in_a_column() -> None:
    found = per_channel_scales(state_dict(torch.arange(1.0, OUT + 1)), QWEN3_MOE)

    assert torch.equal(found[f"{QUERY}.scale"], torch.tensor([[1.0], [2.0], [3.0], [4.0]]))


@pytest.mark.parametrize(
    "path",
    [QUERY, "layers.0.mlp.experts.0.gate_proj", "layers.0.mlp.gate"],
    ids=["right already", "an expert's", "a router's"],
)
def test_other_scales_stay_as_they_are(path: str) -> None:
    scale = torch.ones(OUT, 1) if path == QUERY else torch.ones(1)

    assert per_channel_scales(state_dict(scale, path), QWEN3_MOE) == {}


def test_scale_of_another_shape_is_refused_with_its_name() -> None:
    with pytest.raises(CheckpointError, match=rf"^{QUERY}\.scale: .*\[3, 1\] does not fit.*again"):
        per_channel_scales(state_dict(torch.ones(3, 1)), QWEN3_MOE)


def test_weights_that_are_not_quantized_have_no_scale_to_change() -> None:
    tensors = state_dict(torch.ones(1))
    tensors[f"{QUERY}.weight"] = torch.ones(OUT, IN)

    assert per_channel_scales(tensors, QWEN3_MOE) == {}
