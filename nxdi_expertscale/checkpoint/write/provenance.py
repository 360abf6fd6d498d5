"""What a folder was made from: the state of a source, and whether a folder still fits it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.chunks import row_ranges
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each
from nxdi_expertscale.checkpoint.read.files import (
    CONFIG,
    Checkpoint,
    TensorReader,
    checked_file,
)
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.checkpoint.write.manifest import (
    Manifest,
    SourceRecord,
    normalized,
    read_manifest,
)
from nxdi_expertscale.checkpoint.write.plan import quantized_tensors
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.lookup import require_family
from nxdi_expertscale.plugins.manager import known_families


def source_state(source: Checkpoint) -> dict[str, SourceRecord]:
    """Size and time of change of each file of a source, by name; no digest of weights yet."""
    return {name: _state(source, name) for name in (*source.headers, CONFIG)}


def _state(source: Checkpoint, name: str) -> SourceRecord:
    path = checked_file(source.folder, name)
    status = path.stat()
    digest = "" if name in source.headers else digests.digest_file(path)
    return SourceRecord(name, status.st_size, status.st_mtime_ns, digest)


def expect_unchanged(source: Checkpoint, state: Mapping[str, SourceRecord]) -> None:
    """Check that a source is still what was read.

    Args:
        source: The source.
        state: What :func:`source_state` gave before the weights were read.

    Raises:
        CheckpointError: A file was changed.
    """
    changed = [name for name, record in source_state(source).items() if record != state[name]]
    # A change between reading the headers and taking the state shows in the headers.
    if changed or open_model(source.folder)[0] != source:
        raise CheckpointError(
            f"{source.folder / (changed or [CONFIG])[0]}: was changed while it was read; run "
            "quantize again when it is complete"
        )


def source_records(
    source: Checkpoint, state: Mapping[str, SourceRecord], of_tensors: Mapping[str, str]
) -> tuple[SourceRecord, ...]:
    """Complete the records of a source's files.

    Args:
        source: The source.
        state: What :func:`source_state` gave.
        of_tensors: Digest of each tensor, in hexadecimal, by name.
    """
    parts = {name: [digests.digest(header)] for name, header in source.headers.items()}
    for tensor in source.tensors.values():
        parts[tensor.file].append(bytes.fromhex(of_tensors[tensor.name]))
    return tuple(
        record
        if name not in parts
        else SourceRecord(name, record.size, record.mtime_ns, digests.combine(parts[name]).hex())
        for name, record in sorted(state.items())
    )


def digest_tensor(reader: TensorReader, tensor: StoredTensor) -> str:
    """Digest of a tensor's bytes, piece by piece, in hexadecimal."""
    return digests.combine(
        digests.digest(reader.read_rows(tensor, rows)) for rows in row_ranges(tensor.shape)
    ).hex()


def digest_tensors(source: Checkpoint) -> dict[str, str]:
    """Digest of each tensor of a checkpoint, in hexadecimal, by name."""
    found: dict[str, str] = {}
    with TensorReader(source) as reader:

        def work(tensor: StoredTensor) -> None:
            found[tensor.name] = digest_tensor(reader, tensor)

        for_each(work, iter(source.tensors.values()), available_cores())
    return found


def mismatch(
    folder: str | os.PathLike[str],
    src: str | os.PathLike[str],
    modules_to_not_convert: Sequence[str],
) -> str | None:
    """Say why a finished folder is not what ``quantize`` would make, or None if it is.

    Files of the source with the size and the time of change that they had are taken for the same,
    as make and rsync do; if only the time differs, their content is read and compared.

    Args:
        folder: The finished folder.
        src: The checkpoint that it should have been made from.
        modules_to_not_convert: The modules that should have been left as they are.

    Raises:
        CheckpointError: The folder has no manifest, or the source is malformed.
    """
    return mismatch_of(read_manifest(folder), open_model(src)[0], modules_to_not_convert)


def mismatch_of(
    manifest: Manifest, source: Checkpoint, modules_to_not_convert: Sequence[str]
) -> str | None:
    """The same for a manifest and a source that are read already; see :func:`mismatch`."""
    state = source_state(source)
    recorded = {record.name: record for record in manifest.source}
    if set(recorded) != set(state):
        return "made from another source: its files have other names"
    for name, record in recorded.items():
        if state[name].size != record.size:
            return f"made from another source: {name} has another size"
    if not _says_the_same(manifest.modules_to_not_convert, modules_to_not_convert, source):
        return (
            f"made with other settings: modules_to_not_convert was "
            f"{list(manifest.modules_to_not_convert)}, and is "
            f"{list(normalized(modules_to_not_convert))}"
        )
    if all(state[name].mtime_ns == record.mtime_ns for name, record in recorded.items()):
        return None
    for found in source_records(source, state, digest_tensors(source)):
        if found.digest != recorded[found.name].digest:
            return f"made from another source: {found.name} has other content"
    return None


def _says_the_same(made_with: Sequence[str], asked: Sequence[str], source: Checkpoint) -> bool:
    # The settings that NxDI is given name the modules of both worlds, and may name the router.
    if normalized(made_with) == normalized(asked):
        return True
    family = require_family(
        source.config.get("model_type"), known_families(), str(source.folder / CONFIG)
    )
    return quantized_tensors(source, family, made_with) == quantized_tensors(source, family, asked)
