"""One safetensors file: its header, checked before anything believes it, and how one is written.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of
the header, little-endian; the header, JSON; the tensors' bytes, without holes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.checkpoint.json_files import parse_json
from nxdi_expertscale.errors import CheckpointError, damaged
from nxdi_expertscale.sources.source import Source

ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes of one element of each of the format's dtypes that have whole bytes."""

MAX_HEADER_BYTES = 32 << 20
"""Longer than the header of any real file; the parsed header of a hostile one must fit memory."""

MAX_AXES = 8
"""More than any weight has; the product of millions of sizes would take hours."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: Its name in the checkpoint.
        dtype: The format's own name of the dtype, ``BF16``, ``F8_E4M3``, …
        shape: Its shape.
        file: Name of the file in the checkpoint's folder.
        offset: Where its bytes start, from the start of the file.
        stride: For a weight ``[out, in]`` that lies transposed within a larger tensor: elements
            from one input to the next. None where the bytes are contiguous, in C order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    stride: int | None = None

    @property
    def nbytes(self) -> int:
        """Number of its bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def rows(self) -> int:
        """Number of its rows, with all axes but the last flattened."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Length of its last axis; 1 where it has fewer than two axes."""
        return self.shape[-1] if len(self.shape) > 1 else 1


def read_header(folder: Source, file: str) -> tuple[list[StoredTensor], bytes]:
    """Read and check the header of a safetensors file.

    Args:
        folder: The checkpoint's folder.
        file: Name of the file.

    Returns:
        The tensors in the order of their bytes, and the header as it stands in the file, its
        length included.

    Raises:
        CheckpointError: The file is truncated, is no safetensors file, or its header does not
            describe the bytes that follow: unknown dtypes, holes, overlaps, names that occur
            twice.
    """
    where, size = folder.location(file), folder.size(file)
    prefix = folder.read_range(file, 0, _LENGTH_BYTES)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise damaged(where, "is truncated or is not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise damaged(
            where,
            f"has a header of {length} bytes, more than the {MAX_HEADER_BYTES} that a real file "
            "needs",
        )
    header = folder.read_range(file, _LENGTH_BYTES, length)
    data_start = _LENGTH_BYTES + length
    tensors = [
        _read_entry(where, file, name, entry, data_start)
        for name, entry in parse_json(header, f"{where}: header").items()
        if name != _METADATA
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_no_holes(where, tensors, data_start, size)
    return tensors, prefix + header


def _read_entry(where: str, file: str, name: str, entry: Any, data_start: int) -> StoredTensor:
    def refused(what: str) -> CheckpointError:
        return damaged(f"{where}: {name}", f"the header has {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refused("an entry that is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise refused(f"an unknown dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise refused("a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise refused("data_offsets that are not two positions")
    begin, end = offsets
    tensor = StoredTensor(name, dtype, tuple(shape), file, data_start + begin)
    if end - begin != tensor.nbytes:
        raise refused(f"{end - begin} bytes for {dtype} {shape}, which takes {tensor.nbytes}")
    return tensor


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 1 << 62 for size in value
    )


def _check_no_holes(
    where: str, tensors: Iterable[StoredTensor], data_start: int, size: int
) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            raise damaged(
                f"{where}: {tensor.name}", "its bytes leave a hole or overlap another tensor's"
            )
        position += tensor.nbytes
    if position != size:
        raise damaged(
            where,
            f"the header describes {position} bytes and the file has {size}: it is truncated or "
            "damaged",
        )


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: name, dtype in the format's own words, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of its bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def lay_out(tensors: Iterable[NewTensor]) -> tuple[bytes, dict[str, int], int]:
    """Lay tensors out in a safetensors file.

    Wider dtypes come first, so that every tensor is aligned to its elements, as the format's own
    writer does; beyond that the order is kept.

    Returns:
        The bytes before the data, each tensor's offset from the start of the file, and the
        file's size.
    """
    ordered = sorted(tensors, key=lambda tensor: -ITEM_SIZES[tensor.dtype])
    entries: dict[str, Any] = {_METADATA: {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    data = _LENGTH_BYTES + len(header)
    offsets = {t.name: data + entries[t.name]["data_offsets"][0] for t in ordered}
    return len(header).to_bytes(_LENGTH_BYTES, "little") + header, offsets, data + position
