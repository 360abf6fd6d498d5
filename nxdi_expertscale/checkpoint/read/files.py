"""A checkpoint folder as it is found: its config, its tensors, and the files beside them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nxdi_expertscale.checkpoint.chunks import as_rows
from nxdi_expertscale.checkpoint.safetensors_format import (
    ITEM_SIZES,
    StoredTensor,
    parse_json,
    read_tensors,
)
from nxdi_expertscale.errors import CheckpointError

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_JSON_BYTES = 32 << 20
"""Longer than any real config or index."""

MAX_HEADERS_BYTES = 64 << 20
"""Longer than the headers of any real checkpoint together."""

MAX_COMPANION_BYTES = 256 << 20
"""Longer than any tokenizer."""

_COMPANIONS = (
    "LICENSE*",
    "*.jinja",
    "*.json",
    "*.model",
    "*.tiktoken",
    "*.txt",
)
"""What is copied beside the weights: tokenizer, generation config, chat template, licence."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, with every header read and checked.

    Attributes:
        folder: The folder, resolved.
        config: What ``config.json`` holds.
        tensors: Every tensor, by name, in the order of the files and of the bytes in them.
        headers: The header of each file of weights, as it stands there, by file name.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    headers: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of all files of weights."""
        return sum((self.folder / name).stat().st_size for name in self.headers)


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint in the layout of Hugging Face, and check them.

    Only safetensors is read. A file may be a symbolic link if it leads to another file of the
    folder, or, in the cache of the Hugging Face hub (``…/snapshots/REVISION``), to its ``blobs``.

    Raises:
        CheckpointError: It is not a checkpoint; a file is missing, truncated or garbage, or lies
            outside the folder; the index and the files do not agree.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: is not a folder; name a local folder with config.json and safetensors "
            "files (a model of the Hugging Face hub has to be downloaded first)"
        )
    path = path.resolve()
    config = read_json(path, CONFIG)
    names, index = _weight_files(path)
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, bytes] = {}
    for name in names:
        found, headers[name] = read_tensors(checked_file(path, name))
        if sum(map(len, headers.values())) > MAX_HEADERS_BYTES:
            raise CheckpointError(
                f"{path}: its files have headers of more than {MAX_HEADERS_BYTES} bytes, which no "
                "real checkpoint has; download it again"
            )
        for tensor in found:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{path / name}: {tensor.name}: is in {tensors[tensor.name].file} as well; "
                    "remove the file that does not belong to the checkpoint"
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(path, index, tensors)
    if not tensors:
        raise CheckpointError(f"{path}: the checkpoint has no tensors; download it again")
    return Checkpoint(path, config, tensors, headers)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint folder.

    Raises:
        CheckpointError: It is missing, too long, or not a JSON object.
    """
    return parse_json(_read_small(folder, name, MAX_JSON_BYTES), str(folder / name))


def read_companion(folder: Path, name: str) -> bytes:
    """Read a file that belongs beside the weights; see :func:`companions`.

    Raises:
        CheckpointError: It is missing, or too long.
    """
    return _read_small(folder, name, MAX_COMPANION_BYTES)


def _read_small(folder: Path, name: str, limit: int) -> bytes:
    with checked_file(folder, name).open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CheckpointError(f"{folder / name}: is too long to be a real one; download it again")
    return content


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and name == Path(name).name and "\0" not in name


def checked_file(folder: Path, name: str) -> Path:
    """Path of a file of a resolved folder, if it is a file that belongs there.

    Raises:
        CheckpointError: It is missing, not a regular file, or leads out of the folder.
    """
    path = folder / name
    if not is_file_name(name):
        raise CheckpointError(
            f"{folder}: the index names {name!r}, which is not a file of the folder"
        )
    try:
        target = path.resolve(strict=True)
    except PermissionError:
        raise
    except (OSError, RuntimeError):
        raise CheckpointError(
            f"{path}: is missing; download the checkpoint again, completely"
        ) from None
    if target.parent not in _own_folders(folder):
        raise CheckpointError(
            f"{path}: is a symbolic link out of the checkpoint's folder; put the file itself there"
        )
    if not stat.S_ISREG(target.stat().st_mode):
        raise CheckpointError(f"{path}: is not a regular file; put the file itself there")
    return path


def _own_folders(folder: Path) -> Iterator[Path]:
    yield folder
    # The hub's cache: models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH
    if folder.parent.name == "snapshots":
        yield folder.parent.parent / "blobs"


def _weight_files(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    # The order in which NxDI and transformers look.
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE], None
    if not (folder / INDEX).exists():
        raise CheckpointError(
            f"{folder}: is not a checkpoint with safetensors files: it has neither {SINGLE_FILE} "
            f"nor {INDEX} (pickled weights are never read; convert them first)"
        )
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise CheckpointError(f"{folder / INDEX}: has no weight_map; download it again")
    return sorted(set(weight_map.values())), weight_map


def _check_index(
    folder: Path, index: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            raise CheckpointError(
                f"{folder / file}: {name}: is missing, though the index says it is there; "
                "download the file again"
            )
    extra = next((tensor for name, tensor in tensors.items() if name not in index), None)
    if extra is not None:
        raise CheckpointError(
            f"{folder / INDEX}: does not name {extra.name}, which is in {extra.file}; download "
            "the index again"
        )


def companions(folder: Path, leave_out: Iterable[str] = ()) -> list[str]:
    """Names of the files that belong beside the weights: tokenizer, generation config, licence."""
    skipped = {CONFIG, INDEX, *leave_out}
    names = {path.name for pattern in _COMPANIONS for path in folder.glob(pattern)}
    return sorted(
        name
        for name in names - skipped
        if not name.startswith(".")
        and not name.endswith(".index.json")
        and checked_file(folder, name)
    )


class TensorReader:
    """Reads tensors of a checkpoint into buffers, without mapping files into memory.

    Safe to use from several threads. Files stay open until it is closed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._descriptors = {
            name: os.open(checked_file(checkpoint.folder, name), os.O_RDONLY)
            for name in checkpoint.headers
        }

    def read_into(self, buffer: memoryview, file: str, offset: int) -> None:
        """Fill a buffer with the bytes of a file from an offset on.

        Raises:
            CheckpointError: The disk fails, or the file ends before, so it was cut after its
                header was read.
        """
        while buffer:
            try:
                count = os.preadv(self._descriptors[file], [buffer], offset)
            except OSError as error:
                # The system does not name the file.
                raise CheckpointError(
                    f"{self._folder / file}: cannot be read at byte {offset} ({error.strerror}); "
                    "check the disk, or download the file again"
                ) from error
            if count == 0:
                raise CheckpointError(f"{self._folder / file}: was truncated while it was read")
            buffer = buffer[count:]
            offset += count

    def read_rows(self, tensor: StoredTensor, rows: range) -> bytearray:
        """The bytes of some rows of a tensor."""
        data = bytearray(len(rows) * (tensor.nbytes // as_rows(tensor.shape)[0]))
        self.read_rows_into(memoryview(data), tensor, rows)
        return data

    def read_rows_into(self, buffer: memoryview, tensor: StoredTensor, rows: range) -> None:
        """Fill a buffer with the bytes of some rows of a tensor, in order.

        Raises:
            CheckpointError: The file ends before, so it was cut after its header was read.
        """
        row_bytes = len(buffer) // max(1, len(rows))
        if tensor.pitch is None:
            self.read_into(buffer, tensor.file, tensor.offset + rows.start * row_bytes)
            return
        item = ITEM_SIZES[tensor.dtype]
        inputs, width = tensor.shape[1], len(rows) * item
        transposed = bytearray(inputs * width)
        view = memoryview(transposed)
        for number in range(inputs):
            offset = tensor.offset + (number * tensor.pitch + rows.start) * item
            self.read_into(view[number * width : (number + 1) * width], tensor.file, offset)
        by_input = np.frombuffer(transposed, f"u{item}").reshape(inputs, len(rows))
        np.frombuffer(buffer, f"u{item}").reshape(len(rows), inputs)[...] = by_input.T

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
