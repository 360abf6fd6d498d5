"""A folder that was opened once: whatever its path leads to later, its files are those of then."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from io import FileIO
from pathlib import Path

from nxdi_expertscale.checkpoint.digests import digest_file_object
from nxdi_expertscale.sources.closing import Closing

# Not every system has these flags; without them a link is still noticed by looking at it.
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class PinnedFolder(Closing):
    """A folder, reached through a descriptor. It is closed at the end of a ``with`` block.

    Files in it are created, read, renamed and removed by names, never through a symbolic link.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> PinnedFolder:
        """Open a folder by its path, following links.

        Raises:
            OSError: There is none.
        """
        return cls(os.open(path, _FOLDER))

    def open_folder(self, name: str) -> PinnedFolder:
        """Open a folder in this one; it is made if there is none.

        Raises:
            NotADirectoryError: There is a file or a link of this name.
            OSError: It cannot be made or opened.
        """
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=self._descriptor)
        if not stat.S_ISDIR(self._lstat(name).st_mode):
            raise NotADirectoryError(name)
        return PinnedFolder(os.open(name, _FOLDER | _NO_LINK, dir_fd=self._descriptor))

    def holds(self, name: str, folder: PinnedFolder) -> bool:
        """Whether a name in this folder still is that of a folder that was opened."""
        with suppress(FileNotFoundError):
            return _is_same(self._lstat(name), os.fstat(folder._descriptor))
        return False

    def names(self) -> list[str]:
        """The names of everything in it, sorted."""
        return sorted(os.listdir(self._descriptor))  # noqa: PTH208

    def is_file(self, name: str) -> bool:
        """Whether there is a regular file of this name, and no link."""
        with suppress(FileNotFoundError):
            return stat.S_ISREG(self._lstat(name).st_mode)
        return False

    def is_folder(self, name: str) -> bool:
        """Whether there is a folder of this name, and no link."""
        with suppress(FileNotFoundError):
            return stat.S_ISDIR(self._lstat(name).st_mode)
        return False

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._lstat(name).st_size

    def create(self, name: str) -> FileIO:
        """Create a file, or empty the one that is there, for writing without a buffer."""
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | _NO_LINK
        return FileIO(os.open(name, flags, 0o666, dir_fd=self._descriptor), "w")

    def open_file(self, name: str) -> FileIO:
        """Open a file for reading without a buffer."""
        return FileIO(os.open(name, os.O_RDONLY | _NO_LINK, dir_fd=self._descriptor), "r")

    def read(self, name: str, *, limit: int) -> bytes:
        """Read a file, not more than some bytes of it."""
        with self.open_file(name) as file:
            return file.read(limit)

    def digest(self, name: str) -> str:
        """Digest of a file's content, in hexadecimal."""
        with self.open_file(name) as file:
            return digest_file_object(file)

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically: it is there with all of its content, or not at all."""
        partial = f"{name}.partial"
        with self.create(partial) as file:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        self.move(partial, self, name)
        self.sync()

    def move(self, name: str, folder: PinnedFolder, new_name: str | None = None) -> None:
        """Move a file to a folder of the same disk, in place of what has its name there."""
        os.rename(
            name,
            name if new_name is None else new_name,
            src_dir_fd=self._descriptor,
            dst_dir_fd=folder._descriptor,
        )

    def remove(self, name: str) -> None:
        """Remove a file or a link, if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def remove_folder(self, name: str) -> None:
        """Remove an empty folder; anything else of this name is left alone."""
        with suppress(OSError):
            os.rmdir(name, dir_fd=self._descriptor)

    def sync(self) -> None:
        """Flush the names in it to the disk."""
        os.fsync(self._descriptor)

    def lock_file(self, name: str) -> FileIO:
        """Open a file to lock it; it is created if there is none."""
        flags = os.O_CREAT | os.O_RDWR | _NO_LINK
        return FileIO(os.open(name, flags, 0o666, dir_fd=self._descriptor), "r+")

    def is_open_file(self, name: str, file: FileIO) -> bool:
        """Whether a name still is that of a file that was opened."""
        with suppress(FileNotFoundError):
            return _is_same(self._lstat(name), os.fstat(file.fileno()))
        return False

    def _lstat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
