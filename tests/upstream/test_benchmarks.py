"""What the benchmarks do with NxDI, on a model that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy, busy, conversion, overhead, through_nxdi
from benchmarks.trainium import checks
from benchmarks.trainium.plan import Setup, Variant, variants
from nxdi_expertscale.checkpoint import quantize_checkpoint
from tests.harness import models

pytestmark = pytest.mark.usefixtures("active")


@pytest.fixture(scope="session")
def fp8(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "fp8"
    quantize_checkpoint(moe, folder)
    return folder


def test_nxdi_and_the_reference_have_the_same_logits(nxdi: Any, moe: Path, fp8: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(1, 128, (3, models.SEQUENCE), generator=generator)

    found = through_nxdi.logits(nxdi, moe, fp8, windows)

    expected = accuracy.reference_logits(moe, fp8, windows)
    assert found.keys() == expected.keys()
    for kind, logits in found.items():
        assert nxdi.relative_error(logits, expected[kind]) < 1e-4, kind
    assert nxdi.relative_error(found["averaged"], found["original"]) > 0.1


def test_configurations_for_the_device_are_made(one_rank: None, moe: Path, tmp_path: Path) -> None:
    setup = Setup(moe, tmp_path, tp_degree=2, max_model_len=64)

    found = [checks.check_configuration(setup, variant) for variant in variants(setup)]

    assert [check.outcome for check in found] == [checks.Outcome.GOOD] * 3


def test_configuration_that_nxdi_refuses_is_bad(one_rank: None, moe: Path, tmp_path: Path) -> None:
    setup = Setup(moe, tmp_path, tp_degree=2, max_model_len=64)
    override = {**variants(setup)[1].override, "quantization_type": "per_tensor_symmetric"}

    found = checks.check_configuration(setup, Variant("wrong", override))

    assert found.outcome is checks.Outcome.BAD
    assert "per_channel_symmetric" in found.detail


def test_overhead_is_measured(nxdi: Any, moe: Path, fp8: Path) -> None:
    seconds = overhead.conversion(nxdi, moe, fp8, tokens=models.SEQUENCE)
    check = overhead.whole_model_check(nxdi, moe, fp8, tokens=models.SEQUENCE)
    layer = overhead.forward(nxdi, moe, fp8, tokens=models.SEQUENCE)

    assert min(*seconds.values(), check["seconds"]) > 0
    own, shared = layer["expert_wise"], layer["per_channel"]
    assert own["operations"] == shared["operations"] > 0
    assert own["gigaflops"] == shared["gigaflops"]
    assert own["scale_bytes"] == models.EXPERTS * shared["scale_bytes"]


def test_conversion_is_measured(nxdi: Any, moe: Path, fp8: Path) -> None:
    fp8_settings = overhead.settings(nxdi, fp8, expert_wise=True, tokens=models.SEQUENCE)
    found = {
        "release": "0.9",
        "busy": False,
        "peak_bytes": {"with": 2, "without": 1},
        **busy.machine(),
        **{
            kind: conversion.seconds_of(nxdi, moe, repetitions=1, **settings)
            for kind, settings in (
                ("fp8", fp8_settings),
                ("any_fp8", fp8_settings),
                ("bfloat16", {"torch_dtype": torch.bfloat16}),
            )
        },
    }

    assert all(min(found[kind].values()) > 0 for kind in conversion.KINDS)
    assert conversion.table(found).row_count == len(conversion.KINDS) + 1
