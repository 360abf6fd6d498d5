"""The state dict against that of the pull request that this project started from, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.testing.whole_model import WITHIN_FP8
from tests.harness import processes, targets
from tests.harness.targets import Target
from tests.harness.whole_model import Comparison

PADDED = {"blockwise_matmul_config": {"use_shard_on_intermediate_dynamic_while": True}}

CASES: list[dict[str, Any]] = [
    {"expert_wise_scale": expert_wise, "fused_qkv": fused_qkv, **(PADDED if padded else {})}
    for expert_wise, fused_qkv, padded in itertools.product([True, False], repeat=3)
]


@pytest.fixture(scope="session")
def seed() -> Target:
    found = targets.seed()
    if found is None:
        pytest.skip("the pull request's sources are not at hand")
    return found


@pytest.fixture(scope="session")
def fp8(nxdi: Any, moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return nxdi.quantize(moe, tmp_path_factory.mktemp("fp8"))


@pytest.fixture(scope="session")
def seeds_results(
    seed: Target, moe: Path, fp8: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what the pull request makes of each case, named by the case's number."""
    folder = tmp_path_factory.mktemp("seed")
    settings = [{**fp8, **case} for case in CASES]
    processes.run_on_ranks(seed, 1, folder / "store", convert_all, moe, settings, folder)
    return folder


def convert_all(
    _rank: int, checkpoint: Path, cases: Sequence[dict[str, Any]], folder: Path
) -> None:
    """Convert a checkpoint with each of some settings, without this project's patches."""
    import nxdi_expertscale
    from tests.harness import running

    nxdi_expertscale.deactivate()
    for number, settings in enumerate(cases):
        torch.save(running.convert(checkpoint, **settings), folder / f"{number}.pt")


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_state_dict_equals_the_pull_requests(
    nxdi: Any, target: Target, moe: Path, fp8: dict[str, Any], seeds_results: Path, number: int
) -> None:
    case = CASES[number]
    if case["fused_qkv"] and target.version < (0, 6):
        pytest.skip("this release cannot fuse the QKV weights of a Qwen3 MoE")
    if "blockwise_matmul_config" in case and target.version < (0, 7):
        pytest.skip("this release does not pad the experts")

    actual = nxdi.convert(moe, **fp8, **case)

    expected = torch.load(seeds_results / f"{number}.pt")
    if target.version < (0, 7):
        # These releases do not give attention its rank; the pull request's does.
        expected = {key: value for key, value in expected.items() if "attn.rank_util" not in key}
    assert nxdi.different_tensors(actual, expected) == []


def run_on_the_seed(
    _rank: int, checkpoint: Path, settings: dict[str, Any]
) -> tuple[list[str], Comparison]:
    """The state of each seam, and the model's errors, on an upstream that has the feature."""
    import nxdi_expertscale
    from tests.harness import running

    nxdi_expertscale.activate()
    loaded = running.load(checkpoint, **settings, expert_wise_scale=True)
    states = [f"{seam.seam} {seam.state}" for seam in nxdi_expertscale.status()]
    return states, running.compare(checkpoint, loaded)


def test_upstream_that_has_the_feature_is_left_to_itself(
    target: Target, seed: Target, moe: Path, fp8: dict[str, Any], tmp_path: Path
) -> None:
    if not target.is_double:
        pytest.skip("it is run once, whatever the target")

    [(states, found)] = processes.run_on_ranks(
        seed, 1, tmp_path / "store", run_on_the_seed, moe, fp8
    )

    assert {"config native", "quantization native", "state_dict:qwen3_moe native"} <= set(states)
    assert found.beyond(WITHIN_FP8) == {}
