"""A checkpoint's tensors without their values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nxdi_expertscale.checkpoint.read.without_values import has_headers, read_without_values
from nxdi_expertscale.errors import CheckpointError
from tests.harness import checkpoints

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
)


def test_names_shapes_and_dtypes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path / "model", checkpoints.by_channel(checkpoints.tensors()))
    whole = checkpoints.load(folder)

    found = read_without_values(folder)

    assert found.keys() == whole.keys()
    for name, tensor in found.items():
        assert tensor.is_meta
        assert (tensor.dtype, tensor.shape) == (whole[name].dtype, whole[name].shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_known(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.zeros(2, 3).to(dtype)}, tmp_path / "model.safetensors")

    assert read_without_values(tmp_path)["a"].dtype == dtype


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = checkpoints.save(tmp_path / "model", shards=1)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_without_values(folder)


def test_pickles_have_no_headers(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")

    assert not has_headers(tmp_path)
    assert has_headers(checkpoints.save(tmp_path / "model"))
