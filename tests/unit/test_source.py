from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nxdi_expertscale.checkpoint.read.auxiliary import find_auxiliary_files
from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.sources.folder import open_folder
from tests.harness import checkpoints

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "model")


def read(path: Path) -> WeightFiles:
    return open_model(path).files


def rewrite_index(folder: Path, weight_map: dict[str, object]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_all_tensors_are_found_in_the_order_of_the_files(folder: Path) -> None:
    files = read(folder)

    assert set(files.tensors) == set(checkpoints.tensors())
    assert [t.file for t in files.tensors.values()] == sorted(
        t.file for t in files.tensors.values()
    )


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path / "model", shards=1)

    assert set(read(folder).tensors) == set(checkpoints.tensors())


def test_a_folder_of_the_hubs_cache_is_read(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))

    assert set(read(snapshot).tensors) == set(checkpoints.tensors())
    names = find_auxiliary_files(open_folder(snapshot)).names
    assert names == ("generation_config.json", "tokenizer.json")


@pytest.mark.parametrize("name", ["config.json", SECOND, INDEX])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)

    with pytest.raises(CheckpointError, match=f"{name}: is a symbolic link out of"):
        read(folder)


def test_a_link_within_the_folder_is_followed(folder: Path) -> None:
    (folder / SECOND).rename(folder / "weights")
    (folder / SECOND).symlink_to("weights")

    assert set(read(folder).tensors) == set(checkpoints.tensors())


def test_a_link_to_itself_is_refused(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).symlink_to(SECOND)

    with pytest.raises(CheckpointError, match=f"{SECOND}: is missing"):
        read(folder)


def test_a_pipe_is_refused_and_not_waited_for(folder: Path) -> None:
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)

    with pytest.raises(CheckpointError, match="is not a regular file"):
        read(folder)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", "a\0b"]
)
def test_an_index_that_names_files_outside_the_folder_is_refused(folder: Path, file: str) -> None:
    rewrite_index(folder, {"model.norm.weight": file})

    with pytest.raises(CheckpointError, match="which is not a file of the folder"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' occurs twice"),
        ('{"weight_map": {}}', "has no tensors"),
    ],
)
def test_a_malformed_index_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / INDEX).write_text(text)

    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()

    with pytest.raises(CheckpointError, match=f"{SECOND}: is missing"):
        read(folder)


def test_a_tensor_that_the_index_promises_has_to_be_there(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    rewrite_index(folder, {**index, "model.layers.9.mlp.gate.weight": SECOND})

    with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.gate\.weight: is missing"):
        read(folder)


def test_a_tensor_that_the_index_does_not_name_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    del index["model.norm.weight"]
    rewrite_index(folder, index)

    with pytest.raises(CheckpointError, match=r"does not name model\.norm\.weight"):
        read(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / "again.safetensors").write_bytes((folder / SECOND).read_bytes())
    rewrite_index(folder, {**index, "again": "again.safetensors"})

    with pytest.raises(CheckpointError, match=r"is in .*\.safetensors as well"):
        read(folder)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: is missing"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "is not a JSON object"),
        (lambda folder: (folder / "config.json").write_text('{"a": Infinity}'), "is not JSON"),
        (lambda folder: (folder / INDEX).unlink(), "has neither model.safetensors nor"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(folder: Path, prepare: object, message: str) -> None:
    assert callable(prepare)
    prepare(folder)

    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path / "model")
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")

    with pytest.raises(CheckpointError, match="pickled weights are never read"):
        read(folder)


def test_a_name_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        read(tmp_path / "Qwen" / "Qwen3-30B-A3B")
