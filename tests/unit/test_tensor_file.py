from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from nxdi_expertscale.checkpoint import safetensors_format
from nxdi_expertscale.checkpoint.safetensors_format import NewTensor, lay_out, read_header
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.sources.folder import open_folder


def write(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_are_found_where_the_library_put_them(tmp_path: Path) -> None:
    values = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "matrix": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    }
    save_file(values, tmp_path / "a.safetensors")

    tensors, header = read_header(open_folder(tmp_path), "a.safetensors")

    content = (tmp_path / "a.safetensors").read_bytes()
    assert content.startswith(header)
    assert {tensor.name: tensor.shape for tensor in tensors} == {
        name: tuple(value.shape) for name, value in values.items()
    }
    matrix = next(tensor for tensor in tensors if tensor.name == "matrix")
    expected = values["matrix"].view(torch.uint8).numpy().tobytes()
    assert content[matrix.offset : matrix.offset + matrix.nbytes] == expected


def test_what_is_laid_out_is_read_by_the_library() -> None:
    new = [
        NewTensor("q", "F8_E4M3", (3,)),
        NewTensor("s", "F32", (2, 1)),
        NewTensor("e", "F32", (0,)),
    ]

    header, offsets, size = lay_out(new)
    data = bytearray(size)
    data[: len(header)] = header
    data[offsets["s"] : offsets["s"] + 8] = torch.tensor([1.0, 2.0]).numpy().tobytes()
    data[offsets["q"] : offsets["q"] + 3] = b"\x38\x40\x44"

    found = load(bytes(data))
    assert found["s"].tolist() == [[1.0], [2.0]]
    assert found["q"].float().tolist() == [1.0, 2.0, 3.0]
    assert found["e"].shape == (0,)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": NaN}', b"", "NaN is not JSON"),
        (b"\xff\xfe", b"", "not valid JSON"),
        (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', b"", "'a' occurs twice"),
        ({"a": "F32"}, b"", "a: the header has an entry that is not"),
        ({"a": {"dtype": "F32", "shape": []}}, b"", "a: the header has an entry that is not"),
        ({"a": entry(0, 4, [1], "F33")}, bytes(4), "unknown dtype 'F33'"),
        ({"a": entry(0, 4, [-1])}, bytes(4), "a shape that is not a list of sizes"),
        ({"a": entry(0, 4, [True])}, bytes(4), "a shape that is not a list of sizes"),
        ({"a": entry(0, 4, [1.0])}, bytes(4), "a shape that is not a list of sizes"),
        ({"a": entry(0, 4, [10**30])}, bytes(4), "a shape that is not a list of sizes"),
        ({"a": {**entry(0, 4, [1]), "data_offsets": [4]}}, bytes(4), "not two positions"),
        ({"a": entry(0, 8, [1])}, bytes(8), "8 bytes for F32 \\[1\\], which takes 4"),
        ({"a": entry(4, 0, [1])}, bytes(4), "-4 bytes for F32"),
        ({"a": entry(4, 8, [1])}, bytes(8), "a: its bytes leave a hole or overlap"),
        ({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4), "leave a hole or overlap"),
        ({"a": entry(0, 4, [1])}, bytes(3), "truncated or damaged"),
        ({"a": entry(0, 4, [1])}, bytes(5), "truncated or damaged"),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, header: Any, data: bytes, message: str
) -> None:
    path = write(tmp_path / "a.safetensors", header, data)

    with pytest.raises(CheckpointError, match=message) as error:
        read_header(open_folder(path.parent), path.name)

    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(7) + b"\x01", b"\xff" * 64])
def test_a_file_that_ends_in_its_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match="truncated or is not a safetensors file"):
        read_header(open_folder(path.parent), path.name)


def test_a_header_too_long_to_be_parsed_in_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_format, "MAX_HEADER_BYTES", 10)
    path = write(tmp_path / "a.safetensors", b"{" + b" " * 20 + b"}", b"")

    with pytest.raises(CheckpointError, match="has a header of 22 bytes"):
        read_header(open_folder(path.parent), path.name)


@given(st.binary(max_size=200))
def test_garbage_is_an_error_of_ours(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "a.safetensors"
    path.write_bytes(len(content).to_bytes(8, "little") + content)

    try:
        tensors, _ = read_header(open_folder(path.parent), path.name)
    except CheckpointError:
        return
    assert tensors == []
