"""``doctor --model``: one checkpoint on this host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from nxdi_expertscale.checkpoint import quantize_checkpoint
from nxdi_expertscale.cli.commands import cli
from nxdi_expertscale.diagnostics import doctor, model_check
from nxdi_expertscale.diagnostics.probe import Probe
from tests.harness import checkpoints


def test_original_and_finished_folder_are_judged(tmp_path: Path) -> None:
    src = checkpoints.save(tmp_path / "src")
    dst = quantize_checkpoint(src, tmp_path / "dst").destination

    before, after = model_check.examine_model(src), model_check.examine_model(dst)

    assert before.findings == after.findings == ()
    assert before.rows["weights"] == "full precision"
    assert after.rows["weights"] == "compressed-tensors FP8"
    assert before.rows["in FP8"] == f"{after.rows['in FP8']}, once it is quantized"
    assert "free disk beside it" in before.rows and "free disk beside it" not in after.rows


def test_model_that_nxdi_computes_wrongly_is_a_problem(tmp_path: Path) -> None:
    src = checkpoints.save(tmp_path / "src", config={"norm_topk_prob": False})

    (found,) = model_check.examine_model(src).findings

    assert found.is_problem and "NxDI ignores norm_topk_prob=false" in found.text


def test_folder_that_is_no_checkpoint_is_a_problem(tmp_path: Path) -> None:
    (found,) = model_check.examine_model(tmp_path).findings

    assert found.is_problem and str(tmp_path) in found.text


def test_too_little_memory_or_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = checkpoints.save(tmp_path / "src")
    monkeypatch.setattr(model_check.os, "sysconf", lambda _: 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))

    memory, disk = model_check.examine_model(src).findings

    assert not memory.is_problem and "100 bytes of memory" in memory.text
    assert not disk.is_problem and "1 byte are free" in disk.text


def test_doctor_tells_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = checkpoints.save(tmp_path / "src", config={"attention_bias": True})
    monkeypatch.setattr(doctor.probe, "run", lambda _: Probe(has_nxdi=True))

    plain = CliRunner().invoke(cli, ["doctor", "--model", str(src)])
    answer = json.loads(CliRunner().invoke(cli, ["doctor", "--model", str(src), "--json"]).stdout)

    assert "Model\n" in plain.stdout and "qwen3_moe" in plain.stdout
    assert answer["model"]["family"] == "qwen3_moe"
    assert any("NxDI ignores the biases" in problem for problem in answer["problems"])
