"""What a folder is made from: the files of a source, and whether they change meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.json_files import MAX_JSON_BYTES
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each
from nxdi_expertscale.checkpoint.read.chunks import row_ranges
from nxdi_expertscale.checkpoint.read.files import CONFIG, read_weight_files
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.checkpoint.write.manifest import SourceRecord
from nxdi_expertscale.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source, as it is when a run begins.

    Attributes:
        name: Its name.
        size: Its bytes.
        mtime_ns: When it was last changed, in nanoseconds.
        identity: What the file system says of it.
    """

    name: str
    size: int
    mtime_ns: int
    identity: str


def source_files(source: Model) -> dict[str, SourceFile]:
    """The files that a source is read from, by name."""
    folder = source.folder
    return {
        name: SourceFile(name, folder.size(name), folder.mtime_ns(name), folder.identity(name))
        for name in (*source.files.headers, CONFIG)
    }


def source_records(
    source: Model, files: Mapping[str, SourceFile], tensor_digests: Mapping[str, str]
) -> tuple[SourceRecord, ...]:
    """The records of a source's files, for the manifest.

    Args:
        source: The source.
        files: What :func:`source_files` gave.
        tensor_digests: Digest of each tensor, in hexadecimal, by name.
    """
    parts = {name: [digests.digest(header)] for name, header in source.files.headers.items()}
    for tensor in source.files.tensors.values():
        parts[tensor.file].append(bytes.fromhex(tensor_digests[tensor.name]))
    found = {name: digests.combine(digested).hex() for name, digested in parts.items()}
    found[CONFIG] = _digest_config(source)
    return tuple(
        SourceRecord(name, file.size, file.mtime_ns, found[name])
        for name, file in sorted(files.items())
    )


def _digest_config(source: Model) -> str:
    return digests.digest(source.folder.read(CONFIG, limit=MAX_JSON_BYTES)).hex()


def check_unchanged(
    source: Model, files: Mapping[str, SourceFile], tensor_digests: Mapping[str, str]
) -> None:
    """Check that a source is still what was read.

    A file of which the file system says something else than before is read again: it may have
    been touched only.

    Args:
        source: The source.
        files: What :func:`source_files` gave before the weights were read.
        tensor_digests: Digest of each tensor as it was read, in hexadecimal, by name.

    Raises:
        CheckpointError: A file was changed.
    """
    changed = {name for name, file in source_files(source).items() if file != files[name]}
    # A change between opening the model and looking at the files shows in the headers.
    if read_weight_files(source.folder).headers != source.files.headers:
        raise _changed(source, min(changed, default=CONFIG))
    if CONFIG in changed:
        raise _changed(source, CONFIG)
    with TensorReader(source.files) as reader:
        tensors = [t for t in source.files.tensors.values() if t.file in changed]
        for tensor in _find_changed(reader, tensors, tensor_digests):
            raise _changed(source, tensor.file)


def _changed(source: Model, name: str) -> CheckpointError:
    return CheckpointError(
        f"{source.folder.location(name)}: was changed while it was read; run quantize again when "
        "it is complete"
    )


def _find_changed(
    reader: TensorReader, tensors: Iterable[StoredTensor], tensor_digests: Mapping[str, str]
) -> list[StoredTensor]:
    """The tensors whose bytes are not those of a digest any more."""
    changed: list[StoredTensor] = []

    def look(tensor: StoredTensor) -> None:
        if digest_tensor(reader, tensor) != tensor_digests[tensor.name]:
            changed.append(tensor)

    for_each(look, iter(tensors), available_cores())
    return changed


def digest_tensor(reader: TensorReader, tensor: StoredTensor) -> str:
    """Digest of a tensor's bytes, chunk by chunk, in hexadecimal."""
    return digests.combine(
        digests.digest(reader.read_rows(tensor, rows)) for rows in row_ranges(tensor)
    ).hex()
