"""What arrives at NxD's kernels, each replaced by one that keeps what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.numerics import fp8
from tests.harness import models
from tests.harness.targets import Target

pytestmark = pytest.mark.usefixtures("active")

FUSED_WIDTH = 128
"""Of an expert: what Qwen3 MoE's fused token generation needs."""
BLOCK_SIZE = 512
FUSED_KERNELS = (
    "moe_block_tkg_kernel",
    "_moe_tkg_forward_all_experts_nki_call",
    "_moe_token_gen_selective_load_kernel_nki_call",
)
"""Their names in NxD's ``moe_fused_tkg``; releases differ."""


class CalledError(Exception):
    """Ends a call of a kernel: there is nothing that could give its result."""


class Kernel:
    """In a kernel's place: keeps the keywords that it is called with."""

    def __init__(self) -> None:
        self.keywords: dict[str, Any] = {}

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        return self

    def __call__(self, **keywords: Any) -> Any:
        self.keywords = keywords
        raise CalledError


def hugging_face_scales(checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales of the first layer's experts, ``[E, 2, I]`` and ``[E, H]``, from the weights."""
    experts = models.load(checkpoint).model.layers[0].mlp.experts

    def scale(projection: Any) -> torch.Tensor:
        return fp8.quantize_per_channel(projection.weight.data)[1].squeeze(1)

    gate_up = [torch.stack([scale(expert.gate_proj), scale(expert.up_proj)]) for expert in experts]
    return torch.stack(gate_up), torch.stack([scale(expert.down_proj) for expert in experts])


@pytest.fixture
def wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Qwen3 MoE whose experts are wide enough for fused token generation."""
    monkeypatch.setattr(models, "MOE_INTERMEDIATE_SIZE", FUSED_WIDTH)
    return models.save_qwen3_moe(tmp_path / "wide", spread=16.0)


@pytest.mark.parametrize("batch", [1, 4], ids=["some experts", "all experts"])
def test_fused_token_generation_gets_one_scale_per_expert(
    nxdi: Any,
    target: Target,
    wide: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
) -> None:
    if target.is_double or target.version < (0, 7):
        pytest.skip("no fused token generation for Qwen3 MoE")
    from neuronx_distributed.modules.moe import moe_fused_tkg

    kernel = Kernel()
    for name in FUSED_KERNELS:
        if hasattr(moe_fused_tkg, name):
            monkeypatch.setattr(moe_fused_tkg, name, kernel)
    settings = nxdi.quantize(wide, tmp_path / "fp8")
    loaded = nxdi.load(wide, **settings, expert_wise_scale=True, moe_fused_nki_kernel_enabled=True)

    with pytest.raises(CalledError), torch.no_grad():
        loaded.module.layers[0].mlp(torch.randn(batch, 1, models.HIDDEN_SIZE))

    gate_up, down = hugging_face_scales(wide)
    assert kernel.keywords["expert_gate_up_weights"].dtype == torch.float8_e4m3fn
    assert torch.equal(kernel.keywords["expert_gate_up_weights_scale"], gate_up)
    assert torch.equal(kernel.keywords["expert_down_weights_scale"], down)


def test_fused_token_generation_with_a_shared_scale_is_refused(
    nxdi: Any, target: Target, wide: Path, tmp_path: Path
) -> None:
    if target.is_double or target.version < (0, 7):
        pytest.skip("no fused token generation for Qwen3 MoE")
    settings = nxdi.quantize(wide, tmp_path / "fp8")

    with pytest.raises(ConfigurationError, match="moe_fused_nki_kernel_enabled"):
        nxdi.load(wide, **settings, moe_fused_nki_kernel_enabled=True)


def test_blockwise_kernel_gets_one_scale_per_expert(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target.is_double:
        pytest.skip("the double has no kernels")
    from neuronx_distributed.modules.moe import blockwise, expert_mlps_v2

    kernel = Kernel()
    monkeypatch.setattr(expert_mlps_v2, "can_use_blockwise_matmul_nki", lambda **_: True)
    monkeypatch.setattr(blockwise, "BlockwiseMatmulArgs", kernel)
    settings = nxdi.quantize(moe, tmp_path / "fp8")
    loaded = nxdi.load(moe, **settings, expert_wise_scale=True)
    expert_mlps = loaded.module.layers[0].mlp.expert_mlps
    expert_mlps.blockwise_matmul_config.skip_dma = SimpleNamespace(skip_token=False)
    experts = expert_mlps.mlp_op

    with pytest.raises(CalledError), torch.no_grad():
        loaded.module.layers[0].mlp(torch.randn(1, BLOCK_SIZE // 2, models.HIDDEN_SIZE))

    gate_up, down = hugging_face_scales(moe)
    shape = (models.EXPERTS, models.HIDDEN_SIZE, 2, models.MOE_INTERMEDIATE_SIZE)
    weight = kernel.keywords["gate_up_proj_weight"]
    assert weight.shape == shape
    if target.version < (0, 7):
        assert weight.dtype == torch.float8_e4m3fn
        got = kernel.keywords["gate_up_proj_scale"], kernel.keywords["down_proj_scale"]
        assert torch.equal(got[0], gate_up.flatten(1).unsqueeze(1))
        assert torch.equal(got[1], down.unsqueeze(1))
        return
    # From 0.7 on NxD takes every scale of three dimensions for one of blocks, and dequantizes.
    assert kernel.keywords["gate_up_proj_scale"] is kernel.keywords["down_proj_scale"] is None
    quantized = experts.gate_up_proj.weight.view(shape).float()
    assert torch.allclose(weight, quantized * gate_up[:, None])
    quantized = experts.down_proj.weight.float()
    assert torch.allclose(kernel.keywords["down_proj_weight"], quantized * down[:, None])


ONE_CORE = {"logical_nc_config": 1}


@pytest.mark.parametrize(
    ("settings", "refused_from", "refused_before"),
    [
        # (settings, first release that refuses them, first that does so no more)
        ({**ONE_CORE, "blockwise_matmul_config": ONE_CORE}, (0, 5), (0, 9)),
        ({"blockwise_matmul_config": ONE_CORE}, (0, 7), (0, 9)),
        (ONE_CORE, (0, 5), (1, 0)),
        ({**ONE_CORE, "blockwise_matmul_config": {"use_torch_block_wise": True}}, (0, 5), (0, 7)),
        ({**ONE_CORE, "capacity_factor": 2.0}, (0, 7), (1, 0)),
    ],
    ids=["both", "blockwise", "logical_nc_config", "without the kernel", "capacity factor"],
)
def test_one_logical_core_is_refused_where_the_kernel_runs(
    nxdi: Any,
    target: Target,
    moe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    refused_from: tuple[int, int],
    refused_before: tuple[int, int],
) -> None:
    asked = {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(tmp_path),
        "modules_to_not_convert": [nxdi.ROUTER],
        "expert_wise_scale": True,
    }

    def config() -> Any:
        return nxdi.inference_config(moe, **asked, **{**settings})

    assert config().neuron_config.expert_wise_scale, "a CPU has no kernels"
    monkeypatch.setenv("NXD_CPU_MODE", "0")
    if refused_from <= target.version < refused_before:
        with pytest.raises(ConfigurationError, match="logical_nc_config=2"):
            config()
    else:
        assert config().neuron_config.expert_wise_scale
