"""An upstream whose seams have moved: no change without the flag, no wrong model with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import targets
from tests.upstream import mutants
from tests.upstream.mutants import Outcome, Scenario
from tests.upstream.mutations import CONFIG, MODEL_WRAPPER, MUTATIONS, QWEN3_MOE, Mutation

ROUNDING = 1e-5

CHECKPOINTS = ("full", "kept", "fp8", "router")
WITHOUT_FLAG = tuple(Scenario(name, name) for name in CHECKPOINTS)
WITH_FLAG = (
    *(Scenario(f"{name}, flag", name, flag=True) for name in CHECKPOINTS),
    Scenario("reloaded, flag", "fp8", flag=True, reloaded=True),
)
UPSTREAMS_OWN = ("kept", "router")
"""Where the seed's feature fails: exclusions, and quantized routers. We stand aside."""
QUANTIZED_EXPERTS = ("fp8", "router", "reloaded")


@pytest.fixture(scope="module")
def settings(
    nxdi: Any, moe: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Settings for checkpoints in full precision, with its experts alone so, and quantized."""
    folder = tmp_path_factory.mktemp("checkpoints")
    under_both_names = [nxdi.ROUTER, "mlp.experts", "mlp.expert_mlps"]
    return {
        "full": {},
        "kept": nxdi.quantize(moe, folder / "kept", not_converted=under_both_names),
        "fp8": nxdi.quantize(moe, folder / "fp8"),
        "router": nxdi.quantize(moe, folder / "router", not_converted=["lm_head"]),
    }


@pytest.fixture(scope="module")
def upstream(
    target: targets.Target,
    settings: Mapping[str, dict[str, Any]],
    moe: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> mutants.Mutants:
    return mutants.Mutants(target, settings, moe, tmp_path_factory.mktemp("mutants"))


@pytest.fixture(scope="module")
def as_it_is(upstream: mutants.Mutants) -> dict[str, Outcome]:
    """What comes of each scenario on upstream as it is, with this package."""
    return upstream.run(None, [*WITHOUT_FLAG, *WITH_FLAG], active=True)


def test_upstream_as_it_is_runs_every_scenario(as_it_is: dict[str, Outcome]) -> None:
    assert {name: outcome.message for name, outcome in as_it_is.items() if outcome.error} == {}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_seam_that_has_moved(
    upstream: mutants.Mutants, as_it_is: dict[str, Outcome], mutation: Mutation
) -> None:
    check(upstream, as_it_is, mutation)


def test_feature_as_the_seed_proposed_it(
    upstream: mutants.Mutants, as_it_is: dict[str, Outcome], target: targets.Target
) -> None:
    seed = targets.seed()
    if seed is None or target.name != "0.7":
        pytest.skip("the pull request's sources are not at hand, or of another release")
    sources = {
        module: seed.paths[0] / Path(*module.split(".")).with_suffix(".py")
        for module in (CONFIG, MODEL_WRAPPER, QWEN3_MOE)
    }
    check(upstream, as_it_is, Mutation("the seed", sources=sources, native=True))


def check(upstream: mutants.Mutants, as_it_is: dict[str, Outcome], mutation: Mutation) -> None:
    without_us = upstream.run(mutation, WITHOUT_FLAG, active=False)
    with_us = upstream.run(mutation, [*WITHOUT_FLAG, *WITH_FLAG], active=True)

    for name, before in without_us.items():
        assert_unchanged(before, with_us[name], as_it_is[name])
    for scenario in WITH_FLAG:
        if mutation.native and scenario.checkpoint in UPSTREAMS_OWN:
            continue
        outcome = with_us[scenario.name]
        shows = scenario.name.removesuffix(", flag") in (mutation.scenarios or QUANTIZED_EXPERTS)
        if mutation.ignored and shows:
            assert outcome.error
            assert any(f"seam '{mutation.seam}'" in line for line in outcome.log), outcome.log
        elif mutation.seam and shows:
            assert outcome.is_ours, outcome
            assert f"seam '{mutation.seam}'" in outcome.message
            assert outcome.late == mutation.late
        elif not outcome.error:
            assert_close(outcome, right(scenario, as_it_is, without_us))
        else:
            # It cannot be loaded without the flag either, or the flag itself is refused.
            assert outcome.is_ours or without_us[scenario.checkpoint].error, outcome


def right(
    scenario: Scenario, as_it_is: Mapping[str, Outcome], without_us: Mapping[str, Outcome]
) -> Outcome:
    """What a model must answer: without quantized experts, as this upstream itself does."""
    by_itself = without_us[scenario.checkpoint]
    if scenario.checkpoint in ("full", "kept") and not by_itself.error:
        return by_itself
    return as_it_is[scenario.name]


def assert_unchanged(before: Outcome, after: Outcome, averaged: Outcome) -> None:
    """Nothing has changed, but for quantized experts, which NxDI by itself cannot load.

    They are loaded with averaged scales, or not at all.
    """
    if re.search(r"Cannot find .*(gate_up|down)_proj", before.message):
        if not after.error:
            assert any("averaged" in line for line in after.log)
            assert_close(after, averaged)
    else:
        assert (before.error, before.message) == (after.error, after.message)
        assert before.logits == after.logits


def assert_close(outcome: Outcome, expected: Outcome) -> None:
    actual, reference = torch.tensor(outcome.logits), torch.tensor(expected.logits)
    assert (actual - reference).norm() / reference.norm() < ROUNDING
