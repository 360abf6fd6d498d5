"""Whether a folder was made from a source is decided by content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nxdi_expertscale.checkpoint import known_digests, mismatch, origin, quantize_checkpoint
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints

SETTINGS = ["lm_head", "layers.0.mlp.experts"]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


@pytest.fixture
def dst(src: Path, tmp_path: Path) -> Path:
    return quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=SETTINGS).destination


def test_a_folder_fits_what_it_was_made_from(src: Path, dst: Path) -> None:
    assert mismatch(dst, src, [*reversed(SETTINGS), "lm_head"]) is None


def test_other_settings_are_told(src: Path, dst: Path) -> None:
    assert "made with other settings" in str(mismatch(dst, src, ["lm_head"]))


def test_a_copy_of_the_source_is_the_same_source(src: Path, dst: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(src, tmp_path / "copy", copy_function=shutil.copyfile)

    assert mismatch(dst, copy, SETTINGS) is None


@pytest.mark.parametrize("shards", [1, 2])
def test_other_files_of_the_same_weights_are_the_same_source(
    dst: Path, tmp_path: Path, shards: int
) -> None:
    other = checkpoints.save(tmp_path / "other", shards=shards)

    assert mismatch(dst, other, SETTINGS) is None


def test_a_float32_copy_is_the_same_source_and_the_other_way_round(
    src: Path, dst: Path, tmp_path: Path
) -> None:
    wide = {name: value.float() for name, value in checkpoints.tensors().items()}
    config = {"torch_dtype": "float32", "attention_dropout": 0.0}
    copy = checkpoints.save(tmp_path / "copy", wide, shards=1, config=config)
    made = quantize_checkpoint(copy, tmp_path / "made", modules_to_not_convert=SETTINGS)

    assert mismatch(dst, copy, SETTINGS) is None
    assert mismatch(made.destination, src, SETTINGS) is None


@pytest.mark.parametrize(
    ("form", "config"),
    [
        (checkpoints.in_blocks, checkpoints.BLOCKS_CONFIG),
        (checkpoints.by_channel, checkpoints.COMPRESSED_CONFIG),
        (checkpoints.by_tensor, checkpoints.COMPRESSED_CONFIG),
    ],
)
def test_a_quantized_source_is_known_again(
    tmp_path: Path, form: Callable[..., checkpoints.Tensors], config: dict[str, Any]
) -> None:
    values = form(checkpoints.tensors())
    settings = {"quantization_config": config}
    src = checkpoints.save(tmp_path / "src", values, config=settings)
    dst = quantize_checkpoint(src, tmp_path / "dst", modules_to_not_convert=SETTINGS).destination
    moved = checkpoints.save(tmp_path / "moved", values, shards=2, config=settings)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    values[name] = (values[name].float() * -1).to(values[name].dtype)
    other = checkpoints.save(tmp_path / "other", values, config=settings)

    assert mismatch(dst, moved, SETTINGS) is None
    assert mismatch(dst, other, SETTINGS) == f"made from another source: {name} has other content"


@pytest.mark.parametrize("name", sorted(checkpoints.tensors()))
def test_one_changed_tensor_is_found_with_sizes_and_times_as_they_were(
    src: Path, dst: Path, name: str
) -> None:
    before = {path: path.stat() for path in src.iterdir()}
    values = checkpoints.tensors()
    values[name] = values[name] * 1.5
    checkpoints.save(src, values)
    for path, status in before.items():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size

    found = mismatch(dst, src, SETTINGS)

    assert found == f"made from another source: {name} has other content"


def test_a_config_that_computes_otherwise_is_another_model(src: Path, dst: Path) -> None:
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))

    assert "rms_norm_eps is 1e-05" in str(mismatch(dst, src, SETTINGS))


def test_a_config_that_says_the_same_in_other_words_is_the_same(src: Path, dst: Path) -> None:
    config = json.loads((src / "config.json").read_text())
    said = {"hidden_act": "silu", "attention_bias": False, "transformers_version": "4.57.6"}
    (src / "config.json").write_text(json.dumps({**config, **said}, indent=4))

    assert mismatch(dst, src, SETTINGS) is None


def test_tensors_that_only_one_of_the_two_has_are_told(dst: Path, tmp_path: Path) -> None:
    values = checkpoints.tensors()
    values["model.extra.weight"] = torch.ones(3)
    more = checkpoints.save(tmp_path / "more", values)

    assert "model.extra.weight is in the source alone" in str(mismatch(dst, more, SETTINGS))


def test_a_folder_without_a_manifest_fits_nothing(src: Path) -> None:
    with pytest.raises(CheckpointError, match="was not made by"):
        mismatch(src, src, [])


def test_of_large_tensors_rows_all_over_are_compared(
    src: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "WHOLE_ELEMENTS", 8)
    for weight in open_model(src).weights:
        rows = [row for part in origin.sample_rows(weight) for row in part]
        assert rows
        assert len(set(rows)) == len(rows) <= origin.EXPERT_ROWS + origin.OTHER_ROWS
        assert set(rows) <= set(range(weight.tensor.rows))


class TestRememberedForAHost:
    """What was found out once is known as long as no file changes."""

    @pytest.fixture(autouse=True)
    def _settled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(known_digests, "SETTLED_SECONDS", -3600.0)

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """The sources that are compared."""
        found: list[Path] = []
        compare = origin.mismatch

        def counted(folder: Path, src: Path, settings: list[str]) -> str | None:
            found.append(src)
            return compare(folder, src, settings)

        monkeypatch.setattr(origin, "mismatch", counted)
        return found

    def test_it_is_found_out_once(self, src: Path, dst: Path, calls: list[Path]) -> None:
        for _ in range(3):
            assert origin.remembered_mismatch(dst, src, SETTINGS) is None
        assert "other settings" in str(origin.remembered_mismatch(dst, src, []))
        assert calls == [src, src]

    def test_a_change_with_times_set_back_is_found_out(
        self, src: Path, dst: Path, calls: list[Path]
    ) -> None:
        assert origin.remembered_mismatch(dst, src, SETTINGS) is None
        before = {path: path.stat() for path in src.iterdir()}
        values = checkpoints.tensors()
        values["lm_head.weight"] *= 2
        checkpoints.save(src, values)
        for path, status in before.items():
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

        assert "lm_head.weight" in str(origin.remembered_mismatch(dst, src, SETTINGS))
        assert len(calls) == 2
