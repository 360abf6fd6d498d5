"""The manifest of a finished folder: what it was made from, with which settings, and its files.

It is written last, so a folder that has one is finished.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from nxdi_expertscale.checkpoint.json_files import (
    MAX_JSON_BYTES,
    parse_json,
    render_json,
)
from nxdi_expertscale.checkpoint.read.files import CONFIG
from nxdi_expertscale.errors import CheckpointError, one_line
from nxdi_expertscale.sources.folder import is_file_name, local_path, open_folder
from nxdi_expertscale.sources.source import Source

MANIFEST = "nxdi_expertscale.json"
FORMAT = 1

_Kind = TypeVar("_Kind")

_logger = logging.getLogger("nxdi_expertscale")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file that was written: name, bytes, and digest of it."""

    name: str
    size: int
    blake3: str


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A file that was read.

    Attributes:
        name: Its name.
        size: Its bytes.
        mtime_ns: When it was last changed, in nanoseconds.
        digest: Digest of its content; see :mod:`nxdi_expertscale.checkpoint.digests`.
    """

    name: str
    size: int
    mtime_ns: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The record of how a finished folder was made.

    Attributes:
        version: The version of this package that made it.
        model_type: The model's type.
        modules_to_not_convert: Modules that were left in full precision.
        source: The files that it was made from.
        origin: What these are of, pinned to a revision: ``hf://org/name@commit`` or an address in
            S3; None for a folder.
        tensors: How many tensors there are of each kind.
        below_floor: Weights with channels that the floor of the scale loses.
        shards: The files of weights.
        files: The other files.
    """

    version: str
    model_type: str
    modules_to_not_convert: tuple[str, ...]
    source: tuple[SourceRecord, ...]
    tensors: Mapping[str, int]
    below_floor: tuple[str, ...]
    shards: tuple[FileRecord, ...]
    files: tuple[FileRecord, ...]
    origin: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 over the names and digests of all files: the same for the same contents."""
        files = sorted(f"{file.name} {file.blake3}\n" for file in (*self.shards, *self.files))
        return hashlib.sha256("".join(files).encode()).hexdigest()

    def to_json(self) -> bytes:
        """The manifest as the bytes of its file."""
        return render_json({"format": FORMAT, "package": "nxdi-expertscale", **asdict(self)})


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read the manifest of a folder that ``quantize`` finished.

    Raises:
        CheckpointError: The folder has none, or one that this version cannot read.
    """
    check_is_folder(folder)
    return manifest_of(open_folder(folder))


def check_is_folder(folder: str | os.PathLike[str]) -> None:
    """Check that a path can be that of a finished folder.

    Raises:
        CheckpointError: There is no folder.
    """
    path = local_path(folder)
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such folder")
    if not path.is_dir():
        raise _unfinished(path, "it is a file; name the folder that quantize made")


def manifest_of(folder: Source) -> Manifest:
    """The manifest of a folder that is open.

    Raises:
        CheckpointError: The folder has none, or one that this version cannot read.
    """
    if folder.has(MANIFEST):
        content = folder.read(MANIFEST, limit=MAX_JSON_BYTES)
        return parse_manifest(content, folder.location(MANIFEST))
    if folder.has(CONFIG):
        raise _unfinished(
            folder.path,
            "it has a config.json, as an original and another tool's folder have; run quantize "
            "with it as SRC",
        )
    raise _unfinished(
        folder.path,
        "it is no checkpoint, for it has no config.json either; run quantize, also again",
    )


def _unfinished(folder: Path | str, what_to_do: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: was not made by nxdi-expertscale quantize, or is not finished: it has no "
        f"{MANIFEST}; {what_to_do}"
    )


def parse_manifest(content: bytes, where: Path | str) -> Manifest:
    """Parse the content of a manifest's file.

    Args:
        content: The bytes of the file.
        where: The file, for messages.

    Raises:
        CheckpointError: It is damaged, or is one that this version cannot read.
    """
    value = parse_json(content, str(where))
    if value.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: has format {value.get('format')!r}, and this version reads "
            f"{FORMAT}; run quantize again"
        )
    try:
        manifest = Manifest(
            version=_of(str, value["version"]),
            model_type=_of(str, value["model_type"]),
            modules_to_not_convert=_texts(value["modules_to_not_convert"]),
            source=tuple(_read_source_record(record) for record in value["source"]),
            tensors={kind: _of(int, count) for kind, count in value["tensors"].items()},
            below_floor=_texts(value.get("below_floor", [])),
            shards=tuple(read_file_record(record) for record in value["shards"]),
            files=tuple(read_file_record(record) for record in value["files"]),
            origin=_optional_text(value.get("origin")),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: is damaged ({one_line(error)}); run quantize again"
        ) from None
    for record in (*manifest.shards, *manifest.files):
        if not is_file_name(record.name):
            raise CheckpointError(
                f"{where}: names {record.name!r}, which is not a file of the folder; "
                "run quantize again"
            )
    return manifest


def read_file_record(value: Mapping[str, Any]) -> FileRecord:
    """The record of a file from its JSON.

    Raises:
        KeyError: A part of it is missing.
        TypeError: A part of it is of another type.
    """
    return FileRecord(_of(str, value["name"]), _of(int, value["size"]), _of(str, value["blake3"]))


def _read_source_record(value: Mapping[str, Any]) -> SourceRecord:
    return SourceRecord(
        _of(str, value["name"]),
        _of(int, value["size"]),
        _of(int, value["mtime_ns"]),
        _of(str, value["digest"]),
    )


def _optional_text(value: Any) -> str | None:
    return None if value is None else _of(str, value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_of(str, text) for text in _of(list, value))


def _of(kind: type[_Kind], value: Any) -> _Kind:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def normalized(exclusions: Sequence[str]) -> tuple[str, ...]:
    """Exclusions as they are compared: the order and repetitions mean nothing."""
    return tuple(sorted(set(exclusions)))
