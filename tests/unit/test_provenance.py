from __future__ import annotations

from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint import is_untouched, quantize_checkpoint
from tests.harness import checkpoints


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


@pytest.fixture
def dst(src: Path, tmp_path: Path) -> Path:
    settings = ["lm_head", "layers.0.mlp.experts"]
    return quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=settings).destination


def test_a_finished_folder_is_untouched_until_it_is_not(src: Path, dst: Path) -> None:
    assert is_untouched(dst)
    assert not is_untouched(src)

    shard = next(dst.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])

    assert not is_untouched(dst)


def test_weights_that_nxdi_would_load_instead_are_a_touch(dst: Path) -> None:
    (dst / "model.safetensors").write_bytes(b"")

    assert not is_untouched(dst)
