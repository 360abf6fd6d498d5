"""The hidden folder of a destination on this host, locked by one run at a time.

Both folders are opened once, and reached through their descriptors from then on.
"""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import TracebackType

from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, FileRecord
from nxdi_expertscale.checkpoint.write.pinned_folder import PinnedFolder
from nxdi_expertscale.checkpoint.write.staging import LOCK, WORK, Staging
from nxdi_expertscale.errors import CheckpointError, CheckpointInUseError


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
                self._remove_all_but_finished()
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
        # The disk is waited for while the digest is made, from the same pages.
        with file, ThreadPoolExecutor(1) as waiting:
            flushed = waiting.submit(os.fsync, file.fileno())
            record = self.file_record(name)
            flushed.result()
        return record
