"""Expert parallelism: each of two ranks holds half of a layer's experts, and of their scales."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.testing.whole_model import WITHIN_FP8
from tests.harness import expert_groups, models, processes
from tests.harness.targets import Target
from tests.harness.whole_model import Comparison

pytestmark = pytest.mark.usefixtures("active")

RANKS = 2
BATCH = 4
SPECULATED = 2
BLOCKS = {"block_size": 16, "use_torch_block_wise": True}
"""Small blocks, so that a prompt as short as the tests' is one; without the kernel."""

SPREAD: dict[str, Any] = {
    "moe_ep_degree": RANKS,
    "batch_size": BATCH,
    "ctx_batch_size": 1,
    "blockwise_matmul_config": BLOCKS,
}
SETTINGS: dict[str, Any] = {"expert_wise_scale": True, **SPREAD}

CALLS = {
    "context": (1, models.SEQUENCE),
    "token generation": (BATCH, 1),
    "speculation": (BATCH, SPECULATED),
}
"""Sequences and tokens of each, of the calls of a layer's experts that have to work."""

TOO_SMALL = {
    "token generation": (BATCH - 1, 1),
    "speculation, below the number of experts": (1, 3),
    "speculation, below a block": (1, 7),
}


@dataclass(frozen=True)
class RankResult:
    """What one rank has and computes."""

    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor
    found: Comparison
    """Of the whole model: what a rank gives is the sum over the ranks."""
    parts: dict[str, torch.Tensor]
    """For each call, this rank's part of the output of the first layer's experts."""
    failures: dict[str, str]
    """For each call that is too small, how upstream failed."""


def inputs(batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * length)
    return torch.randn(batch, length, models.HIDDEN_SIZE, generator=generator)


def run_experts(layer: Any, shape: tuple[int, int]) -> torch.Tensor:
    """What the experts of a layer give on this rank alone."""
    parts: list[torch.Tensor] = []
    hook = layer.mlp.expert_mlps.register_forward_hook(
        lambda _, __, output: parts.append(output.clone())
    )
    with hook, torch.no_grad():
        layer.mlp(inputs(*shape))
    return parts[0]


def load_and_run(rank: int, checkpoint: Path, fp8: dict[str, Any]) -> RankResult:
    """Be one rank: load the model with its patches in force, and run its experts."""
    import nxdi_expertscale
    from tests.harness import running

    nxdi_expertscale.activate()
    spread = expert_groups.Degrees(tensor=1, expert=RANKS)
    expert_groups.make(context=spread, generation=spread)
    degrees = {"tp_degree": RANKS, "moe_tp_degree": 1, **SPREAD}
    loaded = running.load(checkpoint, rank=rank, **degrees, **fp8)
    layer = loaded.module.layers[0]
    failures = {}
    for name, shape in TOO_SMALL.items():
        try:
            run_experts(layer, shape)
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"
    experts = layer.mlp.expert_mlps.mlp_op
    return RankResult(
        experts.gate_up_proj.scale.data,
        experts.down_proj.scale.data,
        running.compare(checkpoint, loaded, rank=rank, **degrees),
        {name: run_experts(layer, shape) for name, shape in CALLS.items()},
        failures,
    )


@pytest.fixture
def reads_degree(target: Target) -> None:
    if target.is_double:
        pytest.skip("the double has one rank")
    if target.version < (0, 7):
        pytest.skip("this release spreads no Qwen3 MoE over ranks")


@pytest.mark.usefixtures("reads_degree")
def test_ranks_together_give_the_output_of_one(
    nxdi: Any, target: Target, moe: Path, tmp_path: Path
) -> None:
    fp8 = nxdi.quantize(moe, tmp_path / "fp8")
    alone = nxdi.load(moe, **fp8, expert_wise_scale=True).module.layers[0]
    whole = alone.mlp.expert_mlps.mlp_op

    results = processes.run_on_ranks(
        target, RANKS, tmp_path / "store", load_and_run, moe, {**fp8, "expert_wise_scale": True}
    )

    half = models.EXPERTS // RANKS
    for rank, result in enumerate(results):
        held = slice(rank * half, (rank + 1) * half)
        assert torch.equal(result.gate_up_scale, whole.gate_up_proj.scale[held])
        assert torch.equal(result.down_scale, whole.down_proj.scale[held])
        assert result.found.beyond(WITHIN_FP8) == {}
        # What is refused early is what upstream cannot do.
        assert result.failures.keys() == TOO_SMALL.keys()
        assert "Selective Loading with Expert parallelism" in result.failures["token generation"]
    for name, shape in CALLS.items():
        together = sum(result.parts[name] for result in results)
        assert nxdi.relative_error(together, run_experts(alone, shape)) < 1e-5


@pytest.fixture
def fp8(nxdi: Any, tmp_path: Path) -> dict[str, Any]:
    return {
        **nxdi.FP8,
        "quantized_checkpoints_path": str(tmp_path),
        "modules_to_not_convert": [nxdi.ROUTER],
    }


def settings_are_read(target: Target) -> bool:
    return target.version >= (0, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3}, "token generation with 3 x 1 tokens .* a batch_size of at least 4"),
        ({"batch_size": 8, "tkg_batch_size": 1}, "a batch_size of at least 4"),
        (
            {"ctx_batch_size": 1, "seq_len": 3, "max_context_length": 3},
            "context encoding with 1 x 3 tokens .* of at least 4 tokens",
        ),
        (
            {"enable_bucketing": True, "context_encoding_buckets": [3, 16]},
            "context encoding with 1 x 3 tokens",
        ),
        (
            {"batch_size": 1, "speculation_length": 4},
            "speculation with 1 x 4 tokens .* a batch_size of at least 2",
        ),
    ],
)
def test_call_that_upstream_cannot_run_is_refused_with_what_works(
    nxdi: Any,
    target: Target,
    moe: Path,
    fp8: dict[str, Any],
    settings: dict[str, Any],
    message: str,
) -> None:
    asked = {**fp8, **SETTINGS, **settings}

    if target.version < (0, 6):  # It has no such setting.
        assert nxdi.inference_config(moe, **asked).neuron_config.expert_wise_scale
        return
    with pytest.raises(ConfigurationError, match=message):
        nxdi.inference_config(moe, **asked)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 1, "moe_ep_degree": 1},
        {"batch_size": 8, "tkg_batch_size": 4},
        {"batch_size": 2, "speculation_length": 4},
        {"enable_bucketing": True},
    ],
)
def test_call_that_upstream_can_run_is_taken(
    nxdi: Any, moe: Path, fp8: dict[str, Any], settings: dict[str, Any]
) -> None:
    config = nxdi.inference_config(moe, **{**fp8, **SETTINGS, **settings})

    assert config.neuron_config.expert_wise_scale


def test_expert_parallelism_of_the_whole_model_is_refused(
    nxdi: Any, moe: Path, fp8: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="no release of NxDI generates tokens with it"):
        nxdi.inference_config(moe, **fp8, expert_wise_scale=True, ep_degree=2)


def test_shared_scale_is_refused_early(
    nxdi: Any, target: Target, moe: Path, fp8: dict[str, Any]
) -> None:
    averaged = {**fp8, **SETTINGS, "expert_wise_scale": False}

    if not settings_are_read(target):
        assert not nxdi.inference_config(moe, **averaged).neuron_config.expert_wise_scale
        return
    with pytest.raises(ConfigurationError, match="a scale that the experts share cannot be spread"):
        nxdi.inference_config(moe, **averaged)


@pytest.mark.parametrize(
    "settings",
    [
        {"quantized": False},
        {"modules_to_not_convert": ["mlp.gate", "mlp.experts", "mlp.expert_mlps"]},
        {"quantization_type": "expert_wise_per_channel_symmetric"},
    ],
)
def test_without_a_shared_scale_nothing_is_refused(
    nxdi: Any, moe: Path, fp8: dict[str, Any], settings: dict[str, Any]
) -> None:
    asked = {**fp8, **SETTINGS, "expert_wise_scale": False, **settings}

    assert nxdi.inference_config(moe, **asked).neuron_config is not None
