"""What a folder was made from: the state of a source, and whether a folder still fits it."""

from __future__ import annotations

from collections.abc import Mapping

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.json_files import MAX_JSON_BYTES, read_json
from nxdi_expertscale.checkpoint.read.chunks import row_ranges
from nxdi_expertscale.checkpoint.read.files import CONFIG, read_weight_files
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.checkpoint.write.manifest import (
    SourceRecord,
)
from nxdi_expertscale.errors import CheckpointError


def source_state(source: Model) -> dict[str, SourceRecord]:
    """Size and time of change of each file of a source, by name; no digest of weights yet."""
    return {name: _state(source, name) for name in (*source.files.headers, CONFIG)}


def _state(source: Model, name: str) -> SourceRecord:
    folder = source.folder
    digest = "" if name in source.files.headers else _digest_small_file(source, name)
    return SourceRecord(name, folder.size(name), folder.mtime_ns(name), digest)


def _digest_small_file(source: Model, name: str) -> str:
    return digests.digest(source.folder.read(name, limit=MAX_JSON_BYTES)).hex()


def check_unchanged(source: Model, state: Mapping[str, SourceRecord]) -> None:
    """Check that a source is still what was read.

    Args:
        source: The source.
        state: What :func:`source_state` gave before the weights were read.

    Raises:
        CheckpointError: A file was changed.
    """
    changed = [name for name, record in source_state(source).items() if record != state[name]]
    # A change between opening the model and taking the state shows in the headers.
    if changed or not _is_as_opened(source):
        raise CheckpointError(
            f"{source.folder.location((changed or [CONFIG])[0])}: was changed while it was read; "
            "run quantize again when it is complete"
        )


def _is_as_opened(source: Model) -> bool:
    return (
        read_json(source.folder, CONFIG) == source.config.raw
        and read_weight_files(source.folder).headers == source.files.headers
    )


def source_records(
    source: Model, state: Mapping[str, SourceRecord], tensor_digests: Mapping[str, str]
) -> tuple[SourceRecord, ...]:
    """Complete the records of a source's files.

    Args:
        source: The source.
        state: What :func:`source_state` gave.
        tensor_digests: Digest of each tensor, in hexadecimal, by name.
    """
    parts = {name: [digests.digest(header)] for name, header in source.files.headers.items()}
    for tensor in source.files.tensors.values():
        parts[tensor.file].append(bytes.fromhex(tensor_digests[tensor.name]))
    return tuple(
        record
        if name not in parts
        else SourceRecord(name, record.size, record.mtime_ns, digests.combine(parts[name]).hex())
        for name, record in sorted(state.items())
    )


def digest_tensor(reader: TensorReader, tensor: StoredTensor) -> str:
    """Digest of a tensor's bytes, chunk by chunk, in hexadecimal."""
    return digests.combine(
        digests.digest(reader.read_rows(tensor, rows)) for rows in row_ranges(tensor)
    ).hex()
