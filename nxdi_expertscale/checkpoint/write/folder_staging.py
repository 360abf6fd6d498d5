"""The hidden folder of a destination on this host, locked by one run at a time.

Both folders are opened once, and reached through their descriptors from then on.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType

from nxdi_expertscale.checkpoint.json_files import MAX_JSON_BYTES
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, FileRecord
from nxdi_expertscale.checkpoint.write.pinned_folder import PinnedFolder
from nxdi_expertscale.checkpoint.write.staging import LOCK, RUN, WORK, Staging
from nxdi_expertscale.errors import CheckpointError, CheckpointInUseError
from nxdi_expertscale.sources.closing import Closing


def is_complete(destination: Path) -> bool:
    """Whether all files of a destination are written, and what remains is to move some."""
    return (destination / WORK / MANIFEST).is_file()


class FolderStaging(Staging):
    """The hidden folder of a destination; see :class:`Staging`.

    A run that fails removes what the next one cannot use: everything, if no shard was finished.

    Raises:
        CheckpointInUseError: Another run has it (on entering).
        CheckpointError: Somebody else made it, or put links into it (on entering).
    """

    def __init__(self, destination: Path) -> None:
        super().__init__(str(destination))
        self._path = destination
        self._new_folders: list[Path] = []
        self._open = ExitStack()
        self._destination: PinnedFolder
        self._work: PinnedFolder

    def __enter__(self) -> FolderStaging:
        candidates = (self._path, *self._path.parents)
        self._new_folders = [folder for folder in candidates if not folder.exists()]
        with ExitStack() as opened:
            while True:
                self._path.mkdir(parents=True, exist_ok=True)
                self._destination = opened.enter_context(PinnedFolder.open(self._path))
                self._work = opened.enter_context(self._open_work())
                self._check_plain_files()
                lock = opened.enter_context(self._work.lock_file(LOCK))
                self._lock(lock)
                # A run that ended in this moment may have removed what was locked.
                if self._destination.holds(WORK, self._work) and self._work.is_open_file(
                    LOCK, lock
                ):
                    break
                opened.close()
            self._open = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._open:
            if kind is not None and not self._work.is_file(MANIFEST):
                self.remove_unfinished()
            if self._work.names() == [LOCK]:
                self._work.remove(LOCK)
                self._destination.remove_folder(WORK)
                self._remove_new_folders()

    def _open_work(self) -> PinnedFolder:
        try:
            return self._destination.open_folder(WORK)
        except NotADirectoryError:
            raise self._not_ours(self._path / WORK) from None

    def _not_ours(self, path: Path) -> CheckpointError:
        return CheckpointError(
            f"{path}: was not made by nxdi-expertscale; remove {self._path / WORK}, or name "
            "another folder"
        )

    def _check_plain_files(self) -> None:
        # Nothing is written or removed through a link, in a folder that may be anyone's.
        for name in self._work.names():
            if not self._work.is_file(name):
                raise self._not_ours(self._path / WORK / name)

    def _lock(self, file: FileIO) -> None:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointInUseError(
                f"{self._path}: another run is writing to it; wait for its end, or name "
                "another folder"
            ) from None

    def _remove_new_folders(self) -> None:
        for folder in self._new_folders:
            if folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()):
                return
            folder.rmdir()

    def create(self, name: str) -> FileIO:
        """Create a file that is written in many parts."""
        return self._work.create(name)

    def store(self, name: str, file: FileIO) -> FileRecord:
        """Flush a file that is written completely to the disk, and close it; its record."""
        return _store(self._work, name, file, name)

    def adopt(self, record: FileRecord, stored_as: str) -> None:
        """Give a file that another host has stored its name."""
        self._work.move(stored_as, self._work, record.name)


class FolderNodeStore(Closing):
    """The hidden folder of a destination on another host that shares it; see :class:`NodeStore`.

    Files have names that no other process uses until the run adopts them. So a process that is
    given up, and goes on, does no harm.

    Raises:
        OSError: There is no such folder.
    """

    def __init__(self, destination: Path, run: str) -> None:
        self._work = PinnedFolder.open(destination / WORK)
        self._run = run.encode()
        self._prefix = uuid.uuid4().hex

    def is_of_run(self) -> bool:
        """Whether it is the hidden folder that the run writes to."""
        return self._work.is_file(RUN) and self._work.read(RUN, limit=MAX_JSON_BYTES) == self._run

    def stored_as(self, name: str) -> str:
        """The name by which it stores a file."""
        return f"{self._prefix}-{name}"

    def create(self, name: str) -> FileIO:
        """Create a file that is written in many parts."""
        return self._work.create(self.stored_as(name))

    def store(self, name: str, file: FileIO) -> FileRecord:
        """Flush a file that is written completely to the disk, and close it; its record."""
        return _store(self._work, self.stored_as(name), file, name)

    def close(self) -> None:
        """Close the folder."""
        self._work.close()


def _store(folder: PinnedFolder, stored_as: str, file: FileIO, name: str) -> FileRecord:
    # The disk is waited for while the digest is made, from the same pages.
    with file, ThreadPoolExecutor(1) as waiting:
        flushed = waiting.submit(os.fsync, file.fileno())
        record = FileRecord(name, folder.size(stored_as), folder.digest(stored_as))
        flushed.result()
    return record
