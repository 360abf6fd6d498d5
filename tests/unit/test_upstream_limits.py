"""``quantize`` and ``neuron-config`` warn of what NxDI itself gets wrong of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nxdi_expertscale import quantize_checkpoint
from nxdi_expertscale.checkpoint import neuron_settings
from tests.harness import checkpoints


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "model")


def change(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_limit_is_warned_of_with_the_file_and_what_to_do(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(source, norm_topk_prob=False)

    quantize_checkpoint(source, tmp_path / "fp8")

    (warning,) = (line for line in caplog.messages if "limit of NxDI" in line)
    assert warning.startswith(f"{source / 'config.json'}: NxDI ignores norm_topk_prob=false")
    assert warning.endswith("serve this model with another engine")
    caplog.clear()
    neuron_settings(tmp_path / "fp8")
    assert f"{tmp_path / 'fp8' / 'config.json'}: NxDI ignores norm_topk_prob" in caplog.text


def test_length_counts_where_it_is_known(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(source, norm_topk_prob=True, use_sliding_window=True, sliding_window=4096)

    quantize_checkpoint(source, tmp_path / "fp8")

    assert "from 4097 tokens on" in caplog.text
    caplog.clear()
    neuron_settings(tmp_path / "fp8", seq_len=4096)
    assert "limit of NxDI" not in caplog.text
    neuron_settings(tmp_path / "fp8", seq_len=4097)
    assert "use a seq_len of at most 4096" in caplog.text


def test_what_nxdi_runs_rightly_is_not_warned_of(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(source, norm_topk_prob=True)

    quantize_checkpoint(source, tmp_path / "fp8")
    neuron_settings(tmp_path / "fp8")

    assert "limit of NxDI" not in caplog.text
