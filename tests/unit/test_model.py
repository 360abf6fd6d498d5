"""A checkpoint is opened and checked once, whatever a command does with it."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import pytest

from nxdi_expertscale.checkpoint import (
    inspect_checkpoint,
    mismatch,
    neuron_settings,
    quantize_checkpoint,
    verify_checkpoint,
)
from nxdi_expertscale.checkpoint.read.architecture import check_architecture
from nxdi_expertscale.checkpoint.read.config import read_config
from nxdi_expertscale.checkpoint.read.files import read_weight_files
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.read.tensors import read_weights
from nxdi_expertscale.evaluation.evaluate import evaluate_checkpoint
from nxdi_expertscale.families.built_in import QWEN3_MOE
from tests.harness import checkpoints

CHECKS = (open_model, read_config, read_weights, check_architecture)


@contextmanager
def calls_of(*functions: Callable[..., Any]) -> Iterator[Counter[str]]:
    """Count calls of functions, which run as they are, in any thread."""
    names = {f.__code__: f.__name__ for f in functions if isinstance(f, FunctionType)}
    assert len(names) == len(functions)
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code in names:
            calls[names[frame.f_code]] += 1

    before = sys.getprofile()
    threading.setprofile(count)
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(
        tmp_path / "src", config={"vocab_size": 256, "rope_theta": 1e4}, values=_bytes()
    )


def _bytes() -> checkpoints.Tensors:
    """The weights of a model whose tokens are bytes, so that it needs no tokenizer."""
    values = checkpoints.tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        values[name] = values[name].repeat(4, 1)
    return values


@pytest.fixture
def dst(src: Path, tmp_path: Path) -> Path:
    (src / "tokenizer.json").unlink()
    return quantize_checkpoint(src, tmp_path / "dst").destination


@pytest.mark.parametrize(
    ("command", "opened"),
    [
        (lambda src, dst: quantize_checkpoint(src, dst.parent / "new"), 1),
        (lambda src, dst: quantize_checkpoint(src, dst, overwrite=True), 1),
        (lambda _, dst: verify_checkpoint(dst), 1),
        (lambda src, dst: verify_checkpoint(dst, src), 2),
        (lambda src, _: inspect_checkpoint(src), 1),
        (lambda src, dst: evaluate_checkpoint(src, dst, tokens=8), 2),
        (lambda _, dst: neuron_settings(dst), 1),
        (lambda src, dst: mismatch(dst, src, ["self_attn"]), 2),
    ],
    ids=["quantize", "overwrite", "verify", "against", "inspect", "evaluate", "config", "mismatch"],
)
def test_each_checkpoint_is_opened_and_checked_once(
    src: Path, dst: Path, command: Callable[[Path, Path], Any], opened: int
) -> None:
    with calls_of(*CHECKS) as calls:
        command(src, dst)

    assert calls == {check.__name__: opened for check in CHECKS}


def test_headers_are_read_again_only_to_see_whether_the_source_changed(
    src: Path, tmp_path: Path
) -> None:
    with calls_of(read_weight_files) as calls:
        quantize_checkpoint(src, tmp_path / "new")

    assert calls == {"read_weight_files": 2}


def test_model_knows_what_its_checkpoint_is(tmp_path: Path) -> None:
    values = checkpoints.in_blocks(checkpoints.tensors())
    config = {"quantization_config": checkpoints.BLOCKS_CONFIG}
    folder = checkpoints.save(tmp_path / "model", values, config=config)

    model = open_model(folder)

    assert model.folder.path == folder
    assert model.family is QWEN3_MOE
    assert model.config.num_experts == checkpoints.EXPERTS
    assert model.scheme is not None
    assert model.scheme.block == (checkpoints.BLOCK, checkpoints.BLOCK)
    assert set(model.files.tensors) == set(values)
    assert {weight.name for weight in model.weights} == {
        name for name in values if not name.endswith("_scale_inv")
    }
    quantized = [weight for weight in model.weights if weight.scale is not None]
    assert {weight.name for weight in quantized} == set(filter(checkpoints.is_linear, values)) - {
        name for name in values if name.endswith("_scale_inv")
    }
