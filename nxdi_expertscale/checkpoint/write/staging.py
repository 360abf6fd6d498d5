"""The hidden folder in which a destination is written, so that no half of it can be loaded.

Files are written to a hidden folder inside the destination. Each finished shard has a record
beside it, so a run that was cut off goes on from there. When all are complete they are moved to
their places: the index, without which nothing loads, after all that it names, and the manifest
last. A folder that is replaced loses its index before anything else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import filelock

from nxdi_expertscale.checkpoint.json_files import read_json
from nxdi_expertscale.checkpoint.read.files import INDEX
from nxdi_expertscale.checkpoint.write.manifest import (
    MANIFEST,
    FileRecord,
    read_file_record,
    read_manifest,
)
from nxdi_expertscale.errors import CheckpointError, CheckpointInUseError, one_line
from nxdi_expertscale.sources.folder import open_folder

WORK = ".nxdi-expertscale"
_LOCK = "lock"
_SHARD_SUFFIX = ".safetensors"
_RECORD_SUFFIX = ".record"
"""No file that is copied from a source ends so."""


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard.

    Attributes:
        fingerprint: Digest of all that its bytes depend on: the source's files, the plan, and the
            version of this package.
        file: Its file.
        source_digests: Digest of each tensor of the source that it was made from, hexadecimal.
    """

    fingerprint: str
    file: FileRecord
    source_digests: dict[str, str]


def digests_of_tensors(records: Iterable[ShardRecord]) -> dict[str, str]:
    """The digest of each tensor of the source, from the records of all shards."""
    return {name: value for record in records for name, value in record.source_digests.items()}


def is_complete(destination: Path) -> bool:
    """Whether all files of a destination are written, and what remains is to move some."""
    return (destination / WORK / MANIFEST).is_file()


class Staging:
    """The hidden folder of a destination, locked by one run at a time.

    A run that fails removes what the next one cannot use: everything, if no shard was finished.

    Raises:
        CheckpointInUseError: Another run has it (on entering).
        CheckpointError: Somebody else made it, or put links into it (on entering).
    """

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self._work = destination / WORK
        self._lock = filelock.FileLock(self._work / _LOCK, blocking=False)
        self._new_folders: list[Path] = []

    def __enter__(self) -> Staging:
        candidates = (self._destination, *self._destination.parents)
        self._new_folders = [folder for folder in candidates if not folder.exists()]
        self._work.mkdir(parents=True, exist_ok=True)
        self._check_plain_files()
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise CheckpointInUseError(
                f"{self._destination}: another run is writing to it; wait for its end, or name "
                "another folder"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None and not is_complete(self._destination):
            self._remove_all_but_finished()
        if all(path.name == _LOCK for path in self._work.iterdir()):
            shutil.rmtree(self._work)
            self._remove_new_folders()
        self._lock.release()

    def _check_plain_files(self) -> None:
        # Nothing is written or removed through a link, in a folder that may be anyone's.
        linked = self._work if self._work.is_symlink() else None
        for path in self._work.iterdir():
            if path.is_symlink() or not path.is_file():
                linked = linked or path
        if linked is not None:
            raise CheckpointError(
                f"{linked}: was not made by nxdi-expertscale; remove {self._work}, or name another "
                "folder"
            )

    def _remove_all_but_finished(self) -> None:
        for path in list(self._work.iterdir()):
            is_finished = path.suffix == _SHARD_SUFFIX and self._record(path.name).is_file()
            if not (is_finished or path.name.endswith(_RECORD_SUFFIX) or path.name == _LOCK):
                path.unlink()

    def _remove_new_folders(self) -> None:
        for folder in self._new_folders:
            if any(folder.iterdir()):
                return
            folder.rmdir()

    def path(self, name: str) -> Path:
        """Where a file is while it is written."""
        return self._work / name

    def finished(self, name: str, fingerprint: str) -> ShardRecord | None:
        """The record of a shard that an earlier run finished, if it is the same shard."""
        path = self._record(name)
        if not path.is_file():
            return None
        record = _parse_record(path)
        shard = self.path(name)
        same = record.fingerprint == fingerprint and shard.is_file()
        return record if same and shard.stat().st_size == record.file.size else None

    def finish(self, record: ShardRecord) -> None:
        """Record that a shard is complete; its bytes have to be on the disk."""
        self.write(record.file.name + _RECORD_SUFFIX, json.dumps(asdict(record)).encode())

    def forget(self, name: str) -> None:
        """Remove the record of a shard that is to be written anew."""
        self._record(name).unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        path = self.path(name)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(self._work)

    def publish(self) -> bool:
        """Move all files to their places, if all are written.

        It may be cut off anywhere and be called again.

        Returns:
            Whether all were written.

        Raises:
            CheckpointError: A folder lies where a file has to be.
        """
        if not is_complete(self._destination):
            return False
        manifest = read_manifest(self._work)
        names = [record.name for record in (*manifest.shards, *manifest.files)]
        old = read_manifest(self._destination) if (self._destination / MANIFEST).is_file() else None
        replaced = [record.name for record in (*old.shards, *old.files)] if old else []
        self._check_no_folder([*names, *replaced, INDEX, MANIFEST])
        if old is not None:
            self._remove_old(name for name in replaced if name not in names)
        for name in [*(name for name in names if name != INDEX), INDEX]:
            if self.path(name).exists():
                self.path(name).replace(self._destination / name)
        sync_folder(self._destination)
        self.path(MANIFEST).replace(self._destination / MANIFEST)
        sync_folder(self._destination)
        for path in list(self._work.iterdir()):
            if path.name != _LOCK:
                path.unlink()
        return True

    def _check_no_folder(self, names: Iterable[str]) -> None:
        for path in (self._destination / name for name in names):
            if path.is_dir() and not path.is_symlink():
                raise CheckpointError(
                    f"{path}: is a folder, and a file of the checkpoint has to be there; remove "
                    "it and run quantize again"
                )

    def _remove_old(self, names: Iterable[str]) -> None:
        (self._destination / INDEX).unlink(missing_ok=True)
        sync_folder(self._destination)
        for name in names:
            (self._destination / name).unlink(missing_ok=True)
        (self._destination / MANIFEST).unlink()
        sync_folder(self._destination)

    def _record(self, name: str) -> Path:
        return self.path(name + _RECORD_SUFFIX)


def _parse_record(path: Path) -> ShardRecord:
    value = read_json(open_folder(path.parent), path.name)
    try:
        digests = {
            name: bytes.fromhex(text).hex() for name, text in value["source_digests"].items()
        }
        return ShardRecord(str(value["fingerprint"]), read_file_record(value["file"]), digests)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is damaged ({one_line(error)}); remove it and run quantize again"
        ) from None


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
