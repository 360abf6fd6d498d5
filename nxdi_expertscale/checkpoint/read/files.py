"""The files of a checkpoint in the layout of Hugging Face: weights, index, and what lies beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from nxdi_expertscale.checkpoint.json_files import read_json
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor, read_header
from nxdi_expertscale.errors import CheckpointError, damaged
from nxdi_expertscale.sources.source import Source

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_HEADERS_BYTES = 64 << 20
"""Longer than the headers of any real checkpoint together."""


@dataclass(frozen=True)
class WeightFiles:
    """The files of weights of a checkpoint, each header read and checked.

    Attributes:
        folder: The folder that they lie in.
        tensors: Every tensor, by name, in the order of the files and of the bytes in them.
        headers: The header of each file, as it stands there, by the file's name.
    """

    folder: Source
    tensors: Mapping[str, StoredTensor]
    headers: Mapping[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.folder.size(name) for name in self.headers)

    def location(self, tensor: StoredTensor) -> str:
        """What messages call a tensor: its file and its name."""
        return f"{self.folder.location(tensor.file)}: {tensor.name}"


def read_weight_files(folder: Source) -> WeightFiles:
    """Read and check the header of each file of weights. Only safetensors is read.

    Raises:
        CheckpointError: A file is missing, truncated or garbage, or lies outside the folder; the
            index and the files do not agree.
    """
    names, index = _find_weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, bytes] = {}
    for name, (found, header) in _read_headers(folder, names):
        headers[name] = header
        if sum(map(len, headers.values())) > MAX_HEADERS_BYTES:
            raise damaged(
                folder.path,
                f"its files have headers of more than {MAX_HEADERS_BYTES} bytes, which no real "
                "checkpoint has",
            )
        for tensor in found:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{folder.location(name)}: {tensor.name}: is in {tensors[tensor.name].file} "
                    "as well; remove the file that does not belong to the checkpoint"
                )
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(folder, index, tensors)
    if not tensors:
        raise damaged(folder.path, "the checkpoint has no tensors")
    return WeightFiles(folder, tensors, headers)


def _read_headers(
    folder: Source, names: Sequence[str]
) -> Iterator[tuple[str, tuple[list[StoredTensor], bytes]]]:
    """The header of each file, in order; from far away some are read at a time."""
    step = folder.parallel_reads
    with ThreadPoolExecutor(step) as pool:
        for start in range(0, len(names), step):
            some = names[start : start + step]
            yield from zip(some, pool.map(partial(read_header, folder), some), strict=True)


def _find_weight_files(folder: Source) -> tuple[list[str], Mapping[str, str] | None]:
    """The names of the files of weights, and the index where there is one."""
    # The order in which NxDI and transformers look.
    if folder.has(SINGLE_FILE):
        return [SINGLE_FILE], None
    if not folder.has(INDEX):
        raise CheckpointError(
            f"{folder.path}: is not a checkpoint with safetensors files: it has neither "
            f"{SINGLE_FILE} nor {INDEX} (pickled weights are never read; convert them first)"
        )
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise damaged(folder.location(INDEX), "has no weight_map")
    return sorted(set(weight_map.values())), weight_map


def _check_index(
    folder: Source, index: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    for name, file in index.items():
        if name not in tensors or tensors[name].file != file:
            raise damaged(
                f"{folder.location(file)}: {name}", "is missing, though the index says it is there"
            )
    extra = next((tensor for name, tensor in tensors.items() if name not in index), None)
    if extra is not None:
        raise damaged(
            folder.location(INDEX), f"does not name {extra.name}, which is in {extra.file}"
        )
