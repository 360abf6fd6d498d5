"""A finished folder is what its manifest says, and nothing else is loaded in its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint import quantize_checkpoint, verify_checkpoint
from nxdi_expertscale.checkpoint.finished import check_finished, is_finished
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints

STRAY = [
    "model.safetensors",
    "Model.SafeTensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "consolidated.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.gguf",
    "weights.pt",
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "src")


@pytest.fixture
def dst(src: Path, tmp_path: Path) -> Path:
    return quantize_checkpoint(src, tmp_path / "dst", max_shard_bytes=40_000).destination


def test_a_finished_folder_is_good(src: Path, dst: Path) -> None:
    assert is_finished(dst)
    assert not is_finished(src)
    assert check_finished(dst).model_type == "qwen3_moe"


def test_what_is_loaded_is_held_to_its_digest_whatever_its_size_and_time(dst: Path) -> None:
    for path in sorted(dst.glob("*")):
        if not path.name.startswith(("model", "config")):
            continue
        content, status = path.read_bytes(), path.stat()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(CheckpointError, match=f"{path.name}: has other content than was"):
            check_finished(dst)
        path.write_bytes(content)
    check_finished(dst)


def test_shards_that_changed_places_are_told(dst: Path) -> None:
    first, second, *_ = sorted(dst.glob("*.safetensors"))
    first.rename(dst / "aside")
    second.rename(first)
    (dst / "aside").rename(second)

    with pytest.raises(CheckpointError, match=first.name):
        check_finished(dst)


def test_a_missing_shard_is_told(dst: Path) -> None:
    shard = max(dst.glob("*.safetensors"))
    shard.unlink()

    with pytest.raises(CheckpointError, match=f"{shard.name}: is missing"):
        check_finished(dst)


@pytest.mark.parametrize("name", STRAY)
def test_weights_that_would_be_loaded_instead_are_refused_everywhere(
    src: Path, dst: Path, name: str
) -> None:
    (dst / name).write_bytes(b"")

    with pytest.raises(CheckpointError, match=f"{name}: is no part of the checkpoint"):
        check_finished(dst)
    assert name in [fault.where for fault in verify_checkpoint(dst).faults]
    with pytest.raises(CheckpointError, match=f"{name}: is no part of the checkpoint"):
        quantize_checkpoint(src, dst, overwrite=True)
    assert (dst / name).is_file()


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "tokenizer.model", ".gitattributes"])
def test_other_files_in_the_folder_do_no_harm(dst: Path, name: str) -> None:
    (dst / name).write_bytes(b"")

    check_finished(dst)
    assert verify_checkpoint(dst).faults == ()


def test_what_is_not_loaded_may_be_edited_and_verify_tells_of_it(dst: Path) -> None:
    (dst / "generation_config.json").write_text('{"temperature": 0.6}')

    check_finished(dst)
    (fault,) = verify_checkpoint(dst).faults
    assert fault.where == "generation_config.json"


def test_an_adapter_of_the_source_is_not_copied(src: Path, tmp_path: Path) -> None:
    (src / "adapter_config.json").write_text("{}")

    dst = quantize_checkpoint(src, tmp_path / "dst").destination

    assert not (dst / "adapter_config.json").exists()


def test_destination_and_source_lie_apart(src: Path) -> None:
    for dst, reason in (
        (src, "is the source itself"),
        (src / "fp8", "lies in the source"),
        (src / "a" / ".." / "fp8", "lies in the source"),
        (src.parent, "lies in it"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            quantize_checkpoint(src, dst)
    assert not (src / "fp8").exists()
