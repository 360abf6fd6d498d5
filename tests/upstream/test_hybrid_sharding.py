"""Hybrid sharding: the same experts cut for context encoding, and spread for token generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale import quantize_checkpoint
from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.testing.whole_model import WITHIN_FP8
from tests.harness import expert_groups, models, processes
from tests.harness.targets import Target
from tests.harness.whole_model import Comparison
from tests.upstream.test_expert_parallel import run_experts

pytestmark = pytest.mark.usefixtures("active")

RANKS = 2
GENERATED = (4, 1)
SETTINGS: dict[str, Any] = {
    "batch_size": GENERATED[0],
    "ctx_batch_size": 1,
    "moe_tp_degree": RANKS,
    "hybrid_sharding_config": {
        "moe_cte_tp_degree": RANKS,
        "moe_cte_ep_degree": 1,
        "moe_tkg_tp_degree": 1,
        "moe_tkg_ep_degree": RANKS,
    },
    "blockwise_matmul_config": {"block_size": 16, "use_torch_block_wise": True},
}
EXPERT_WISE = {"expert_wise_scale": True}


@dataclass(frozen=True)
class RankResult:
    """What one rank has and computes."""

    scales: dict[str, torch.Tensor]
    """Of the first layer, by the set of experts and the projection."""
    context: Comparison
    generated: torch.Tensor
    """This rank's part of the output of the first layer's experts, in token generation."""


def load_and_run(rank: int, checkpoint: Path, settings: dict[str, Any]) -> RankResult:
    """Be one rank: load both stages' graphs from the same state dict, and run them."""
    import nxdi_expertscale
    from tests.harness import running

    nxdi_expertscale.activate()
    spread = {name: settings[name] for name in SETTINGS}
    expert_groups.make(
        context=expert_groups.Degrees(tensor=RANKS, expert=1),
        generation=expert_groups.Degrees(tensor=1, expert=RANKS),
    )
    config = running.inference_config(checkpoint, tp_degree=RANKS, **settings)
    application = running.application_cls(checkpoint)(str(checkpoint), config)
    context = running.load_application(application, rank=rank)
    del application.models[0]
    generation = running.load_application(application, rank=rank)
    experts = generation.module.layers[0].mlp.expert_mlps
    return RankResult(
        {
            f"{name}.{projection}": getattr(getattr(experts, name), projection).scale.data
            for name in ("mlp_op", "mlp_op_tkg")
            for projection in ("gate_up_proj", "down_proj")
        },
        running.compare(checkpoint, context, rank=rank, tp_degree=RANKS, **spread),
        run_experts(generation.module.layers[0], GENERATED),
    )


def test_scales_follow_the_weights_to_both_stages(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path
) -> None:
    if target.is_double:
        pytest.skip("the double has one rank")
    if target.version < (0, 7):
        pytest.skip("this release has no hybrid sharding for Qwen3 MoE")
    fp8 = nxdi.quantize(moe, tmp_path / "fp8")
    alone = nxdi.load(moe, **fp8, expert_wise_scale=True).module.layers[0]
    whole = alone.mlp.expert_mlps.mlp_op
    gate, up = whole.gate_up_proj.scale.chunk(2, dim=2)

    results = processes.run_on_ranks(
        target, RANKS, tmp_path / "store", load_and_run, moe, {**fp8, **SETTINGS, **EXPERT_WISE}
    )

    half = models.EXPERTS // RANKS
    for rank, result in enumerate(results):
        cut = torch.cat([part.chunk(RANKS, dim=2)[rank] for part in (gate, up)], dim=2)
        held = slice(rank * half, (rank + 1) * half)
        expected = {
            "mlp_op.gate_up_proj": cut,
            "mlp_op.down_proj": whole.down_proj.scale,
            "mlp_op_tkg.gate_up_proj": whole.gate_up_proj.scale[held],
            "mlp_op_tkg.down_proj": whole.down_proj.scale[held],
        }
        assert nxdi.different_tensors(result.scales, expected) == []
        assert result.context.beyond(WITHIN_FP8) == {}
    together = sum(result.generated for result in results)
    assert nxdi.relative_error(together, run_experts(alone, GENERATED)) < 1e-5


def test_degree_of_token_generation_is_the_one_that_counts(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path
) -> None:
    if target.version < (0, 7):
        pytest.skip("this release has no hybrid sharding for Qwen3 MoE")
    asked = {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(tmp_path),
        **SETTINGS,
        **EXPERT_WISE,
        "batch_size": 3,
    }

    with pytest.raises(ConfigurationError, match="token generation with 3 x 1 tokens"):
        nxdi.inference_config(moe, **asked)


def test_fused_token_generation_beside_it_is_refused(
    nxdi: Any, target: Target, tmp_path: Path
) -> None:
    """NxDI builds Llama 4 with both, and NxD cannot load quantized experts then."""
    if target.is_double:
        pytest.skip("the double has one rank")
    if target.version < (0, 6):
        pytest.skip("this release has no hybrid sharding")
    llama = models.save_llama4(tmp_path / "llama")
    quantize_checkpoint(llama, tmp_path / "fp8")
    asked = {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(tmp_path / "fp8"),
        **SETTINGS,
        **EXPERT_WISE,
        "batch_size": models.EXPERTS,
    }

    with pytest.raises(ConfigurationError, match="hybrid sharding and for fused token generation"):
        processes.run_on_ranks(target, RANKS, tmp_path / "store", load_and_run, llama, asked)
