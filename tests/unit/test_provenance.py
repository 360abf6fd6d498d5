from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint import is_untouched, mismatch, quantize_checkpoint
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


@pytest.fixture
def dst(src: Path, tmp_path: Path) -> Path:
    settings = ["lm_head", "layers.0.mlp.experts"]
    return quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=settings).destination


def test_a_folder_fits_what_it_was_made_from(src: Path, dst: Path) -> None:
    assert mismatch(dst, src, ["layers.0.mlp.experts", "lm_head", "lm_head"]) is None


def test_other_settings_are_told(src: Path, dst: Path) -> None:
    assert "made with other settings" in str(mismatch(dst, src, ["lm_head"]))


def test_a_copy_of_the_source_is_the_same_source(src: Path, dst: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(src, tmp_path / "copy", copy_function=shutil.copyfile)

    assert mismatch(dst, copy, ["layers.0.mlp.experts", "lm_head"]) is None


def test_other_content_of_the_same_size_is_told(src: Path, dst: Path) -> None:
    shard = sorted(src.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(shard, (1, 1))

    found = mismatch(dst, src, ["layers.0.mlp.experts", "lm_head"])

    assert found == f"made from another source: {shard.name} has other content"


def test_another_config_is_told(src: Path, dst: Path) -> None:
    (src / "config.json").write_text((src / "config.json").read_text() + " ")

    found = mismatch(dst, src, ["layers.0.mlp.experts", "lm_head"])

    assert found == "made from another source: config.json has another size"


def test_other_files_are_told(dst: Path, tmp_path: Path) -> None:
    other = checkpoints.save(tmp_path / "other", shards=2)

    found = mismatch(dst, other, ["layers.0.mlp.experts", "lm_head"])

    assert found == "made from another source: its files have other names"


def test_a_folder_without_a_manifest_fits_nothing(src: Path) -> None:
    with pytest.raises(CheckpointError, match="was not made by"):
        mismatch(src, src, [])


def test_a_finished_folder_is_untouched_until_it_is_not(src: Path, dst: Path) -> None:
    assert is_untouched(dst)
    assert not is_untouched(src)

    shard = next(dst.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])

    assert not is_untouched(dst)


def test_weights_that_nxdi_would_load_instead_are_a_touch(dst: Path) -> None:
    (dst / "model.safetensors").write_bytes(b"")

    assert not is_untouched(dst)
