"""The hidden folder in which a destination is written, so that no half of it can be loaded.

Files are written to a hidden folder inside the destination. Each finished shard has a record
beside it, so a run that was cut off goes on from there. When all are complete they are moved to
their places: the index, without which nothing loads, after all that it names, and the manifest
last. A folder that is replaced loses its index before anything else.

Nothing that an earlier run left is believed: its shards and files have to have the digests that
were recorded. Both folders are opened once, and reached through their descriptors from then on.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from io import FileIO
from types import TracebackType
from typing import Any, Protocol

from nxdi_expertscale.checkpoint.json_files import MAX_JSON_BYTES, parse_json
from nxdi_expertscale.checkpoint.read.files import INDEX
from nxdi_expertscale.checkpoint.write.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    parse_manifest,
    read_file_record,
)
from nxdi_expertscale.errors import CheckpointError

CARD = "README.md"
"""The Hugging Face hub's name of a model card."""

WORK = ".nxdi-expertscale"
LOCK = "lock"
RUN = "run"
"""A file that names the run that writes, for the other hosts that write for it."""

_SHARD_SUFFIX = ".safetensors"
_RECORD_SUFFIX = ".record"
"""No file that is copied from a source ends so."""


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        recipe: Digest of what is done with which tensors of the source, and of the version of this
            package that does it.
        file: Its file.
        source_digests: Digest of each tensor of the source that it was made from, hexadecimal.
        source_identities: What the file system said of each file of the source that it was made
            from, by name; see :meth:`~nxdi_expertscale.sources.folder.Folder.identity`.
        below_floor: Names of its weights with channels that the floor of the scale loses.
        energies: Signal and noise of a sample of each weight that was rounded; see
            :func:`~nxdi_expertscale.numerics.fp8.energies`.
    """

    recipe: str
    file: FileRecord
    source_digests: dict[str, str]
    source_identities: dict[str, str]
    below_floor: list[str]
    energies: dict[str, tuple[float, float]]


def digests_of_tensors(records: Iterable[ShardRecord]) -> dict[str, str]:
    """The digest of each tensor of the source, from the records of all shards."""
    return {name: value for record in records for name, value in record.source_digests.items()}


class ShardStore(Protocol):
    """Where shards are written: a :class:`Staging`, or the part of it that another host has."""

    def create(self, name: str) -> FileIO:
        """Create a file that is written in many parts."""

    def store(self, name: str, file: FileIO) -> FileRecord:
        """Close a file that is written completely, and make sure that it is kept; its record."""


class NodeStore(ShardStore, Protocol):
    """What another host has of a :class:`Staging` while it writes shards for a run."""

    def is_of_run(self) -> bool:
        """Whether it is the hidden folder that the run writes to, which it was made for."""

    def stored_as(self, name: str) -> str:
        """The name by which it stores a file, for :meth:`Staging.adopt`."""

    def close(self) -> None:
        """Give back what it holds."""


class StagingFolder(Protocol):
    """Files by name: those of a folder, or of a prefix in S3."""

    def names(self) -> list[str]:
        """The names of everything in it, sorted."""

    def is_file(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def is_folder(self, name: str) -> bool:
        """Whether there is a folder of this name."""

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def digest(self, name: str) -> str:
        """Digest of a file's content, in hexadecimal."""

    def read(self, name: str, *, limit: int) -> bytes:
        """Read a file, not more than some bytes of it."""

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""

    def move(self, name: str, folder: Any, new_name: str | None = None) -> None:
        """Move a file to another folder of the same kind, in place of what has its name there."""

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def sync(self) -> None:
        """Make sure that names in it are kept."""


class Staging(ABC):
    """The hidden folder of a destination, a context while a run writes to it.

    Attributes:
        where: The destination, as messages name it.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._destination: StagingFolder
        self._work: StagingFolder

    @abstractmethod
    def __enter__(self) -> Staging: ...

    @abstractmethod
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    @abstractmethod
    def create(self, name: str) -> FileIO:
        """Create a file that is written in many parts."""

    @abstractmethod
    def store(self, name: str, file: FileIO) -> FileRecord:
        """Close a file that is written completely, and make sure that it is kept; its record."""

    def _in_work(self, name: str) -> str:
        return f"{self.where}/{WORK}/{name}"

    def file_record(self, name: str) -> FileRecord:
        """The record of a file as it is on the disk now."""
        return FileRecord(name, self._work.size(name), self._work.digest(name))

    def finished(self, name: str, recipe: str) -> ShardRecord | None:
        """The record of a shard that an earlier run finished.

        A shard whose record is damaged or of another recipe, or whose bytes are not those that
        were recorded, is to be written again.

        Args:
            name: The shard's file.
            recipe: What it has to be made from; see :class:`ShardRecord`.
        """
        if not self._work.is_file(_record_of(name)):
            return None
        content = self._work.read(_record_of(name), limit=MAX_JSON_BYTES)
        record = _parse_record(content, name)
        if record is not None and record.recipe == recipe and self._is_whole(record.file):
            return record
        self.forget(name)
        return None

    def _is_whole(self, record: FileRecord) -> bool:
        name = record.name
        return (
            self._work.is_file(name)
            and self._work.size(name) == record.size
            and self._work.digest(name) == record.blake3
        )

    def finish(self, record: ShardRecord) -> None:
        """Record that a shard is complete; its bytes have to be on the disk."""
        self.write(_record_of(record.file.name), json.dumps(asdict(record)).encode())

    @abstractmethod
    def adopt(self, record: FileRecord, stored_as: str) -> None:
        """Take a shard that another host has stored; see :class:`ShardStore`.

        Args:
            record: The record of its file.
            stored_as: The name by which the other host wrote it.
        """

    def forget(self, name: str) -> None:
        """Remove the record of a shard that is to be written again."""
        self._work.remove(_record_of(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        self._work.write(name, content)

    def resume_publishing(self) -> bool:
        """Publish what an earlier run wrote completely.

        Files that are missing or damaged are not published: what is whole goes back to the hidden
        folder, and the run goes on from there.

        Returns:
            Whether there was anything to publish, and all of it was whole.

        Raises:
            CheckpointError: A folder lies where a file has to be.
        """
        if not self._work.is_file(MANIFEST):
            return False
        manifest = self._staged_manifest()
        if manifest is not None and self._find_damaged(manifest) is None:
            self.publish()
            return True
        self._take_back(manifest)
        self._work.remove(MANIFEST)
        return False

    def _staged_manifest(self) -> Manifest | None:
        content = self._work.read(MANIFEST, limit=MAX_JSON_BYTES)
        try:
            return parse_manifest(content, self._in_work(MANIFEST))
        except CheckpointError:
            return None

    def _find_damaged(self, manifest: Manifest) -> str | None:
        for record in (*manifest.shards, *manifest.files):
            folder = self._work if self._work.is_file(record.name) else self._destination
            is_whole = (
                folder.is_file(record.name)
                and folder.size(record.name) == record.size
                and folder.digest(record.name) == record.blake3
            )
            if not is_whole:
                return record.name
        return None

    def _take_back(self, manifest: Manifest | None) -> None:
        """Undo a publication that was cut off: its files go back to the hidden folder.

        Files of an older checkpoint, which still has its manifest, stay where they are. Where the
        manifest that was to be published is damaged, the shards are known by their records.
        """
        if self._destination.is_file(MANIFEST):
            return
        names = [
            name.removesuffix(_RECORD_SUFFIX)
            for name in self._work.names()
            if name.endswith(_RECORD_SUFFIX)
        ]
        if manifest is not None:
            names += [record.name for record in (*manifest.shards, *manifest.files)]
        for name in (CARD, *names):
            if self._destination.is_file(name) and not self._work.is_file(name):
                self._destination.move(name, self._work)

    def publish(self) -> None:
        """Move all files to their places. It may be cut off anywhere, and be called again.

        Raises:
            CheckpointError: A file is missing, or a folder lies where a file has to be.
        """
        where = self._in_work(MANIFEST)
        manifest = parse_manifest(self._work.read(MANIFEST, limit=MAX_JSON_BYTES), where)
        records = (*manifest.shards, *manifest.files)
        # Not among the records: whoever publishes the folder may edit the card.
        names = [CARD, *(record.name for record in records)]
        for record in records:
            self._check_present(record)
        replaced = self._names_of_old()
        self._check_no_folder([*names, *replaced, INDEX, MANIFEST])
        if replaced:
            self._remove_old(name for name in replaced if name not in names)
        staged = [name for name in names if self._work.is_file(name)]
        self._move_all(name for name in staged if name != INDEX)
        self._move_all(name for name in staged if name == INDEX)
        self._destination.sync()
        self._work.move(MANIFEST, self._destination)
        self._destination.sync()
        for name in self._work.names():
            if name != LOCK:
                self._work.remove(name)

    def remove_unfinished(self) -> None:
        """Remove everything but finished shards."""
        for name in self._work.names():
            is_finished = name.endswith(_SHARD_SUFFIX) and self._work.is_file(_record_of(name))
            if not (is_finished or name.endswith(_RECORD_SUFFIX) or name == LOCK):
                self._work.remove(name)

    def _move_all(self, names: Iterable[str]) -> None:
        """Move files to their places, in any order."""
        for name in names:
            self._work.move(name, self._destination)

    def _check_present(self, record: FileRecord) -> None:
        for folder in (self._work, self._destination):
            if folder.is_file(record.name) and folder.size(record.name) == record.size:
                return
        raise CheckpointError(
            f"{self._in_work(record.name)}: was removed or changed while the checkpoint was "
            "written; run quantize again"
        )

    def _names_of_old(self) -> list[str]:
        """Names of the files of the checkpoint that is replaced; none if there is none."""
        if not self._destination.is_file(MANIFEST):
            return []
        content = self._destination.read(MANIFEST, limit=MAX_JSON_BYTES)
        old = parse_manifest(content, f"{self.where}/{MANIFEST}")
        return [CARD, *(record.name for record in (*old.shards, *old.files))]

    def _check_no_folder(self, names: Iterable[str]) -> None:
        for name in names:
            if self._destination.is_folder(name):
                raise CheckpointError(
                    f"{self.where}/{name}: is a folder, and a file of the checkpoint has to be "
                    "there; remove it and run quantize again"
                )

    def _remove_old(self, names: Iterable[str]) -> None:
        self._destination.remove(INDEX)
        self._destination.sync()
        for name in names:
            self._destination.remove(name)
        self._destination.remove(MANIFEST)
        self._destination.sync()


def _record_of(shard: str) -> str:
    return shard + _RECORD_SUFFIX


def _parse_record(content: bytes, shard: str) -> ShardRecord | None:
    """The record of a shard; None where it is damaged."""
    try:
        value = parse_json(content, shard)
        record = ShardRecord(
            str(value["recipe"]),
            read_file_record(value["file"]),
            {name: bytes.fromhex(text).hex() for name, text in value["source_digests"].items()},
            {name: str(text) for name, text in value["source_identities"].items()},
            [str(name) for name in value["below_floor"]],
            {name: (float(s), float(n)) for name, (s, n) in value["energies"].items()},
        )
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError):
        return None
    return record if record.file.name == shard else None
