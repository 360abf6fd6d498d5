"""One safetensors file: its header, checked before anything believes it, and how one is written.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of
the header, little-endian; the header, JSON; the tensors' bytes, without holes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nxdi_expertscale.errors import CheckpointError

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

MAX_DEPTH = 64
"""Levels of JSON that are read: fewer than what any of Python's JSON functions can take."""

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_LENGTH_BYTES = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk.

    Attributes:
        name: Its name in the checkpoint.
        dtype: The format's own name of the dtype, ``BF16``, ``F8_E4M3``, …
        shape: Its shape.
        file: Name of the file in the checkpoint's folder.
        offset: Where its bytes start, from the start of the file.
        pitch: For a weight ``[out, in]`` that lies transposed within a larger tensor: elements
            from one input to the next. None where its bytes are together and in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    pitch: int | None = None

    @property
    def nbytes(self) -> int:
        """Number of its bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def read_tensors(path: Path) -> tuple[list[StoredTensor], bytes]:
    """Read and check the header of a safetensors file.

    Returns:
        The tensors in the order of their bytes, and the header as it stands in the file.

    Raises:
        CheckpointError: The file is truncated, is no safetensors file, or its header does not
            describe the bytes that follow: unknown dtypes, holes, overlaps, names that occur
            twice.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise CheckpointError(
                f"{path}: is truncated or is not a safetensors file; download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: has a header of {length} bytes, more than the {MAX_HEADER_BYTES} that "
                "a real file needs; download it again"
            )
        header = file.read(length)
    entries = parse_json(header, f"{path}: header")
    data = _LENGTH_BYTES + length
    tensors = [
        _read_entry(path, name, entry, data) for name, entry in entries.items() if name != _METADATA
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_no_holes(path, tensors, data, size)
    return tensors, prefix + header


def _read_entry(path: Path, name: str, entry: Any, data: int) -> StoredTensor:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {name}: the header has {what}; the file is damaged, download it again"
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("an entry that is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise refuse(f"an unknown dtype {dtype!r}")
    if not _are_sizes(shape) or len(shape) > MAX_AXES:
        raise refuse("a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise refuse("data_offsets that are not two positions")
    begin, end = offsets
    tensor = StoredTensor(name, dtype, tuple(shape), path.name, data + begin)
    if end - begin != tensor.nbytes:
        raise refuse(f"{end - begin} bytes for {dtype} {shape}, which takes {tensor.nbytes}")
    return tensor


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 1 << 62 for size in value
    )


def _check_no_holes(path: Path, tensors: Iterable[StoredTensor], data: int, size: int) -> None:
    position = data
    for tensor in tensors:
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: {tensor.name}: its bytes leave a hole or overlap another tensor's; "
                "the file is damaged, download it again"
            )
        position += tensor.nbytes
    if position != size:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes and the file has {size}; it is "
            "truncated or damaged, download it again"
        )


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object that may come from anyone.

    What it gives can be written again, as JSON and as UTF-8.

    Raises:
        CheckpointError: It is not JSON, not an object, has a name twice, is nested too deeply,
            or holds halves of characters, or NaN or infinity, which are not JSON.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_doubles,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: is not a JSON object; download it again")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        double = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{double!r} occurs twice")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:32]} is too large a number")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for whole in level
            if isinstance(whole, (dict, list))
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
        if not level:
            return
    raise ValueError(f"it has more than {MAX_DEPTH} levels")


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
