"""What a checkpoint is read through, wherever it lies: names, sizes, ranges of bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol


class OpenFiles(Protocol):
    """Files that stay open until they are closed. Safe to use from several threads."""

    def read_into(self, buffer: memoryview, name: str, offset: int) -> None:
        """Fill a buffer with the bytes of a file.

        Args:
            buffer: Writable memory, of bytes.
            name: The file's name.
            offset: Where to start, in bytes from the start of the file.

        Raises:
            CheckpointError: The bytes cannot be had, or the file ends before the buffer is full.
        """

    def close(self) -> None:
        """Close the files."""


class Source(Protocol):
    """The files of one checkpoint: a flat set of names. A context, closed at its end."""

    @property
    def path(self) -> Path | str:
        """Where it lies: a folder's path, or what the user may type for it."""

    @property
    def origin(self) -> str | None:
        """What a manifest names it by, pinned to a revision; None for a folder of this host."""

    @property
    def parallel_reads(self) -> int:
        """How many small reads at a time it answers quicker than one after the other."""

    def location(self, name: str) -> str:
        """What messages call a file."""

    def names(self) -> list[str]:
        """The names of everything in it, sorted."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            CheckpointError: It is missing.
        """

    def identity(self, name: str) -> str:
        """What changes whenever the content of a file does.

        Raises:
            CheckpointError: It is missing.
        """

    def mtime_ns(self, name: str) -> int:
        """When a file was last changed, in nanoseconds since the epoch; 0 where nothing says so.

        Raises:
            CheckpointError: It is missing.
        """

    def read(self, name: str, *, limit: int) -> bytes:
        """Read a small file whole.

        Args:
            name: The file's name.
            limit: The most bytes that a real file of this kind has.

        Raises:
            CheckpointError: It is missing, or longer than the limit.
        """

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read some bytes of a file, fewer where the file ends before.

        Raises:
            CheckpointError: It is missing.
        """

    def open(self, names: Iterable[str]) -> OpenFiles:
        """Open files to read from them many times, in several threads.

        Raises:
            CheckpointError: One is missing.
        """

    def close(self) -> None:
        """Give back what it holds."""

    def __enter__(self) -> Source: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
