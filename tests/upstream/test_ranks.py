"""Tensor parallelism: two processes, each with its part of every expert and of the scales."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale.testing.whole_model import WITHIN_FP8
from tests.harness import models, processes
from tests.harness.targets import Target
from tests.harness.whole_model import Comparison

RANKS = 2


@dataclass(frozen=True)
class RankResult:
    """What one rank has and computes."""

    gate_up_scale: tuple[int, ...]
    down_scale: tuple[int, ...]
    found: Comparison


def load_and_run(rank: int, checkpoint: Path, settings: dict[str, Any]) -> RankResult:
    """Be one rank: load the model with its patches in force, and compare its part of it."""
    import nxdi_expertscale
    from tests.harness import running

    nxdi_expertscale.activate()
    degrees = {"tp_degree": RANKS, "moe_tp_degree": RANKS}
    loaded = running.load(checkpoint, rank=rank, **degrees, **settings)
    experts = loaded.module.layers[0].mlp.expert_mlps.mlp_op
    return RankResult(
        tuple(experts.gate_up_proj.scale.shape),
        tuple(experts.down_proj.scale.shape),
        running.compare(checkpoint, loaded, rank=rank, **degrees),
    )


@pytest.mark.usefixtures("active")
def test_two_ranks_together_give_the_output_of_one(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path
) -> None:
    settings = {**nxdi.quantize(moe, tmp_path / "fp8"), "expert_wise_scale": True}
    alone = nxdi.assert_right(moe, nxdi.load(moe, **settings))

    results = processes.run_on_ranks(target, RANKS, tmp_path / "store", load_and_run, moe, settings)

    for result in results:
        width = 2 * models.MOE_INTERMEDIATE_SIZE // RANKS
        assert result.gate_up_scale == (models.EXPERTS, 1, width)
        assert result.down_scale == (models.EXPERTS, 1, models.HIDDEN_SIZE)
        found = result.found
        assert found.beyond(WITHIN_FP8) == {}
        assert (*found.attention, *found.moe, found.logits) == pytest.approx(
            (*alone.attention, *alone.moe, alone.logits), rel=1e-3
        )
