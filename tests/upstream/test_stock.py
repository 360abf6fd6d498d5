"""NxDI without this package: that the harness runs it rightly, and what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.upstream import models

ROUNDING = 1e-5


def test_unquantized_model_agrees_with_hugging_face(nxdi: Any, moe: Path) -> None:
    loaded = nxdi.load(moe)

    with_hugging_face = models.load(moe)(models.prompt()).logits[:, -1]
    assert nxdi.relative_error(loaded.logits(models.prompt()), with_hugging_face) < ROUNDING
    assert max(nxdi.moe_errors(moe, loaded)) < ROUNDING


def test_quantized_experts_cannot_be_loaded(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    settings = nxdi.quantize(moe, tmp_path / "fp8")

    with pytest.raises(RuntimeError, match=r"Cannot find .*mlp_op\.gate_up_proj\.scale"):
        nxdi.load(moe, **settings)


def test_experts_in_full_precision_are_exact(nxdi: Any, moe: Path, tmp_path: Path) -> None:
    both_worlds = [nxdi.ROUTER, "mlp.experts", "mlp.expert_mlps"]
    settings = nxdi.quantize(moe, tmp_path / "fp8", not_converted=both_worlds)

    loaded = nxdi.load(moe, **settings)

    assert max(nxdi.moe_errors(moe, loaded)) < ROUNDING
    attention = loaded.module.layers[0].self_attn.qkv_proj.q_proj
    assert attention.weight.dtype == torch.float8_e4m3fn


def test_unknown_keyword_is_only_warned_of(
    nxdi: Any, moe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nxdi.inference_config(moe, no_such_setting=1)

    assert "no_such_setting" in caplog.text
