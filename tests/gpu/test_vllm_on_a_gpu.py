"""The real schemes, layers and loader of vLLM read a finished folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale.checkpoint import quantize_checkpoint
from tests.harness import checkpoints
from tests.harness.installed import ROOT
from tests.server.releases import RELEASES, VLLM_VARIABLE

VLLMS = sorted({release.vllm for release in RELEASES})


def read(folder: Path, vllm: str) -> dict[str, Any]:
    """What a vLLM makes of a folder."""
    installed = Path(os.environ.get(VLLM_VARIABLE, "not-named")) / vllm
    if not installed.is_dir():
        pytest.skip(f"there is no {installed}")
    result = subprocess.run(
        [sys.executable, "-m", "tests.gpu.reader", str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("vllm", VLLMS)
def test_every_weight_and_every_experts_scale_arrives(vllm: str, tmp_path: Path) -> None:
    src = checkpoints.save(tmp_path / "src")
    dst = quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=["lm_head"])

    found = read(dst.destination, vllm)
    shapes = found.pop("shapes")

    experts, hidden, intermediate = (
        checkpoints.CONFIG[name] for name in ("num_experts", "hidden_size", "moe_intermediate_size")
    )
    expected = {
        "w13_weight": [experts, 2 * intermediate, hidden],
        "w13_weight_scale": [experts, 2 * intermediate, 1],
        "w2_weight": [experts, hidden, intermediate],
        "w2_weight_scale": [experts, hidden, 1],
    }
    # From 0.16 on the router is the same module's.
    assert {**shapes, **expected} == shapes
    assert found == {
        "experts": "CompressedTensorsW8A8Fp8MoEMethod",
        "attention": "CompressedTensorsW8A8Fp8",
        "without_weight": [],
        "different": [],
    }


@pytest.mark.parametrize("vllm", VLLMS)
def test_quantized_head_is_refused_by_name(vllm: str, tmp_path: Path) -> None:
    dst = quantize_checkpoint(checkpoints.save(tmp_path / "src"), tmp_path / "dst").destination

    assert "named 'lm_head.weight_scale'" in read(dst, vllm)["refused"]
