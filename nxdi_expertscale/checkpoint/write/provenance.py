"""What a folder was made from: the state of a source, and whether a folder still fits it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.json_files import MAX_JSON_BYTES, read_json
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each
from nxdi_expertscale.checkpoint.read.chunks import row_ranges
from nxdi_expertscale.checkpoint.read.files import CONFIG, read_weight_files
from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.checkpoint.write.manifest import (
    Manifest,
    SourceRecord,
    normalized,
    read_manifest,
)
from nxdi_expertscale.checkpoint.write.plan import tensors_to_quantize
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


def _digest_tensors(source: Model) -> dict[str, str]:
    """Digest of each tensor of a checkpoint, in hexadecimal, by name."""
    found: dict[str, str] = {}
    with TensorReader(source.files) as reader:

        def work(tensor: StoredTensor) -> None:
            found[tensor.name] = digest_tensor(reader, tensor)

        for_each(work, iter(source.files.tensors.values()), available_cores())
    return found


def mismatch(
    folder: str | os.PathLike[str],
    src: str | os.PathLike[str],
    modules_to_not_convert: Sequence[str],
) -> str | None:
    """Why a finished folder is not what ``quantize`` would make now, or None if it is.

    Files of the source with the size and the time of change that they had are taken for the same,
    as make and rsync do; if only the time differs, their content is read and compared.

    Args:
        folder: The finished folder.
        src: The checkpoint that it should have been made from.
        modules_to_not_convert: The modules that should have been left in full precision.

    Raises:
        CheckpointError: The folder has no manifest, or the source is malformed.
    """
    return mismatch_of(read_manifest(folder), open_model(src), modules_to_not_convert)


def mismatch_of(
    manifest: Manifest, source: Model, modules_to_not_convert: Sequence[str]
) -> str | None:
    """As :func:`mismatch`, for a manifest that is read and a source that is open already."""
    state = source_state(source)
    recorded = {record.name: record for record in manifest.source}
    if set(recorded) != set(state):
        return "made from another source: its files have other names"
    for name, record in recorded.items():
        if state[name].size != record.size:
            return f"made from another source: {name} has another size"
    if not _are_equivalent(manifest.modules_to_not_convert, modules_to_not_convert, source):
        return (
            f"made with other settings: modules_to_not_convert was "
            f"{list(manifest.modules_to_not_convert)}, and is "
            f"{list(normalized(modules_to_not_convert))}"
        )
    if all(state[name].mtime_ns == record.mtime_ns for name, record in recorded.items()):
        return None
    for found in source_records(source, state, _digest_tensors(source)):
        if found.digest != recorded[found.name].digest:
            return f"made from another source: {found.name} has other content"
    return None


def _are_equivalent(made_with: Sequence[str], requested: Sequence[str], source: Model) -> bool:
    # NxDI's settings name modules both as the checkpoint and as NxDI does, and may name the router.
    return normalized(made_with) == normalized(requested) or tensors_to_quantize(
        source, made_with
    ) == tensors_to_quantize(source, requested)
