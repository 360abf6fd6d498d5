"""The files of a checkpoint in a local folder: names, sizes, ranges of bytes.

What reads a checkpoint needs no more than this of the place where it lies.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from nxdi_expertscale.errors import CheckpointError, damaged, incomplete, one_line
from nxdi_expertscale.sources.closing import Closing


@dataclass(frozen=True)
class Folder(Closing):
    """A local folder, whose files are read by their names and never through a link out of it.

    A file may be a symbolic link if it leads to another file of the folder, or, in the cache of
    the Hugging Face hub (``…/snapshots/REVISION``), to its ``blobs``.

    Attributes:
        path: The folder, absolute and without symbolic links; see :func:`open_folder`.
        origin: What it is a copy of, pinned to a revision; None where nothing says so.
        parallel_reads: A disk answers small reads one after the other.
    """

    path: Path
    origin: str | None = None
    parallel_reads: int = 1

    def location(self, name: str) -> str:
        """What messages call a file of this folder."""
        return str(self.path / name)

    def names(self) -> list[str]:
        """The names of everything in the folder, sorted.

        Raises:
            CheckpointError: One is not UTF-8, so neither a manifest nor an index can hold it.
        """
        names = sorted(path.name for path in self.path.iterdir())
        for name in names:
            if not _is_utf8(name):
                raise CheckpointError(
                    f"{self.location(name)}: has a name that is not UTF-8; rename or remove it"
                )
        return names

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.path / name).exists()

    def checked_path(self, name: str) -> Path:
        """The path of a file that belongs to the folder.

        Raises:
            CheckpointError: It is missing, not a regular file, or leads out of the folder.
        """
        path = self.path / name
        if not is_file_name(name):
            raise CheckpointError(
                f"{self.path}: the index names {name!r}, which is not a file of the folder"
            )
        try:
            target = path.resolve(strict=True)
        except PermissionError:
            raise
        except (OSError, RuntimeError):
            raise incomplete(path, "is missing") from None
        if target.parent not in self._own_folders():
            raise CheckpointError(
                f"{path}: is a symbolic link out of the checkpoint's folder; put the file itself "
                "there"
            )
        if not stat.S_ISREG(target.stat().st_mode):
            raise CheckpointError(f"{path}: is not a regular file; put the file itself there")
        return path

    def _own_folders(self) -> Iterator[Path]:
        yield self.path
        # The hub's cache: models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH
        if self.path.parent.name == "snapshots":
            yield self.path.parent.parent / "blobs"

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            CheckpointError: It is missing, or does not belong to the folder.
        """
        return self.checked_path(name).stat().st_size

    def identity(self, name: str) -> str:
        """What the file system says of a file; see :func:`file_identity`.

        Raises:
            CheckpointError: It is missing, or does not belong to the folder.
        """
        return file_identity(self.checked_path(name).stat())

    def mtime_ns(self, name: str) -> int:
        """When a file was last changed, in nanoseconds since the epoch.

        Raises:
            CheckpointError: It is missing, or does not belong to the folder.
        """
        return self.checked_path(name).stat().st_mtime_ns

    def read(self, name: str, *, limit: int) -> bytes:
        """Read a small file whole.

        Args:
            name: The file's name.
            limit: The most bytes that a real file of this kind has.

        Raises:
            CheckpointError: It is missing, longer than the limit, or does not belong to the folder.
        """
        content = self.read_range(name, 0, limit + 1)
        if len(content) > limit:
            raise damaged(self.location(name), "is too long to be a real one")
        return content

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read some bytes of a file, fewer where the file ends before.

        Raises:
            CheckpointError: It is missing, or does not belong to the folder.
        """
        with self.checked_path(name).open("rb") as file:
            file.seek(offset)
            return file.read(length)

    def open(self, names: Iterable[str]) -> OpenFolderFiles:
        """Open files to read from them many times, in several threads.

        Raises:
            CheckpointError: One is missing, or does not belong to the folder.
        """
        return OpenFolderFiles(self, names)

    def close(self) -> None:
        """A folder holds nothing open."""


class OpenFolderFiles(Closing):
    """Files of a folder that stay open until they are closed. Safe to use from several threads."""

    def __init__(self, folder: Folder, names: Iterable[str]) -> None:
        self._folder = folder
        self._descriptors: dict[str, int] = {}
        with ExitStack() as opened:
            for name in names:
                descriptor = os.open(folder.checked_path(name), os.O_RDONLY)
                opened.callback(os.close, descriptor)
                self._descriptors[name] = descriptor
            self._opened = opened.pop_all()

    def read_into(self, buffer: memoryview, name: str, offset: int) -> None:
        """Fill a buffer with the bytes of a file.

        Args:
            buffer: Writable memory, of bytes.
            name: The file's name.
            offset: Where to start, in bytes from the start of the file.

        Raises:
            CheckpointError: The disk fails, or the file ends before the buffer is full.
        """
        fill(buffer, self._descriptors[name], offset, self._folder.location(name))

    def close(self) -> None:
        """Close the files."""
        self._opened.close()
        self._descriptors.clear()


def fill(buffer: memoryview, descriptor: int, offset: int, where: str) -> None:
    """Fill a buffer with the bytes of an open file.

    Args:
        buffer: Writable memory, of bytes.
        descriptor: The file.
        offset: Where to start, in bytes from the start of the file.
        where: What messages call the file; the system does not name it.

    Raises:
        CheckpointError: The disk fails, or the file ends before the buffer is full.
    """
    while buffer:
        try:
            count = _read_at(descriptor, buffer, offset)
        except OSError as error:
            raise CheckpointError(
                f"{where}: cannot be read at byte {offset} ({error.strerror}); check the disk"
            ) from error
        if count == 0:
            raise CheckpointError(f"{where}: was truncated while it was read")
        buffer = buffer[count:]
        offset += count


def _read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read bytes of a file into a buffer; how many were read, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    # macOS has it from release 11 on. This copies the bytes once more.
    data = os.pread(descriptor, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path on this host that a user names; ``~`` is the user's home.

    Raises:
        CheckpointError: It leads nowhere: a loop of links, or the home of nobody.
    """
    try:
        path = Path(name).expanduser()
        path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{os.fspath(name)!r}: no folder can be there ({one_line(error)}); name another one"
        ) from None
    return path


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """The folder at a path.

    Raises:
        CheckpointError: There is none.
    """
    folder = local_path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is not a folder; name a local folder with config.json and safetensors "
            "files (a model of the Hugging Face hub has to be downloaded first)"
        )
    return Folder(folder.resolve())


def file_identity(status: os.stat_result) -> str:
    """What a file system says of a file, and does not let a program set.

    Device, inode, size, and the times of change of content and of inode. Whoever writes to the
    file, or puts another one in its place, changes one of them, even if the modification time is
    set back afterwards.
    """
    parts = (
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )
    return ":".join(map(str, parts))


def _is_utf8(name: str) -> bool:
    """Whether a name can be written as UTF-8: the system's bytes need not be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and name == Path(name).name and "\0" not in name
