"""A checkpoint that lies behind a network: small reads as they come, weights through a spool.

A connection that breaks goes on where it broke; a server that is busy or away is asked again,
each time a little later, and given up when nothing came of several attempts.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from nxdi_expertscale.errors import CheckpointError, damaged, incomplete
from nxdi_expertscale.sources.closing import Closing
from nxdi_expertscale.sources.folder import fill
from nxdi_expertscale.sources.spool import BLOCK_BYTES, Spool

ATTEMPTS = 8
"""Attempts that bring no byte before a server is given up."""

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0

TIMEOUT_SECONDS = 30.0
"""How long a server may be silent before it is asked again."""

_REMEMBERED_READS = 256

_Answer = TypeVar("_Answer")

_NEVER = threading.Event()


class TransientError(Exception):
    """A failure that may be over at the next attempt.

    Attributes:
        after_seconds: How long the server asks to wait; None where it does not say.
    """

    def __init__(self, what: str, after_seconds: float | None = None) -> None:
        super().__init__(what)
        self.after_seconds = after_seconds


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that a server lists.

    Attributes:
        size: Its bytes.
        identity: What the server names its content by: a digest, or a tag.
        mtime_ns: When it was last changed, in nanoseconds; 0 where the server does not say.
    """

    size: int
    identity: str
    mtime_ns: int = 0


class Transport(Protocol):
    """What a kind of server needs beyond :class:`Remote`."""

    @property
    def path(self) -> str:
        """What the user may type for the checkpoint."""

    @property
    def origin(self) -> str:
        """What a manifest names it by."""

    def files(self) -> Mapping[str, RemoteFile]:
        """The files, by name, as they are now.

        Raises:
            TransientError: It may be possible at the next attempt.
            CheckpointError: It is not, and why.
        """

    def stream(
        self, name: str, offset: int, length: int
    ) -> AbstractContextManager[Iterator[bytes]]:
        """The bytes of a range of a file, in pieces, while the context lasts.

        Raises:
            TransientError: It may be possible at the next attempt.
            CheckpointError: It is not, and why.
        """

    def cached(self, name: str) -> Path | None:
        """A file of this host that is this file; None where there is none."""

    def close(self) -> None:
        """Close connections."""


def patiently(ask: Callable[[], _Answer], where: str) -> _Answer:
    """What a server answers, asked several times if need be.

    Args:
        ask: Asks; raises TransientError to be called again.
        where: What messages call what is asked for.

    Raises:
        CheckpointError: It was given up.
    """
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except TransientError as error:
            _pause(attempt, error, where)
    raise AssertionError("unreachable")


def _pause(attempt: int, error: TransientError, where: str, stop: threading.Event = _NEVER) -> None:
    """Wait before the next attempt, or give up, at once where nobody waits for it any more."""
    if attempt + 1 >= ATTEMPTS:
        raise CheckpointError(
            f"{where}: cannot be read, {error}, at {ATTEMPTS} attempts; run the same again later, "
            "it goes on from the files that are finished"
        ) from error
    growing = FIRST_WAIT_SECONDS * 2**attempt
    asked = error.after_seconds or 0.0
    if stop.wait(min(LONGEST_WAIT_SECONDS, max(growing, asked))):
        raise CheckpointError(f"{where}: is not read any more") from error


class Remote(Closing):
    """A checkpoint behind a :class:`Transport`. A context; its files are listed once."""

    parallel_reads = 16

    def __init__(self, transport: Transport, spool: Path | None) -> None:
        """List the files.

        Args:
            transport: How the server is spoken to.
            spool: Folder for what is read; by default one in the user's cache.

        Raises:
            CheckpointError: The server does not have it, or does not answer.
        """
        self._transport = transport
        self._spool_folder = spool
        self._files = patiently(transport.files, transport.path)

    @property
    def path(self) -> str:
        """What the user may type for it."""
        return self._transport.path

    @property
    def origin(self) -> str:
        """What a manifest names it by, pinned to a revision where there are any."""
        return self._transport.origin

    def location(self, name: str) -> str:
        """What messages call a file."""
        return f"{self.path}/{name}"

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        return sorted(self._files)

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return name in self._files

    def _file(self, name: str) -> RemoteFile:
        try:
            return self._files[name]
        except KeyError:
            raise incomplete(self.location(name), "is missing") from None

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            CheckpointError: It is missing.
        """
        return self._file(name).size

    def identity(self, name: str) -> str:
        """What the server names the content of a file by.

        Raises:
            CheckpointError: It is missing.
        """
        return self._file(name).identity

    def mtime_ns(self, name: str) -> int:
        """When a file was last changed, in nanoseconds since the epoch; 0 where nobody says.

        Raises:
            CheckpointError: It is missing.
        """
        return self._file(name).mtime_ns

    def read(self, name: str, *, limit: int) -> bytes:
        """Read a small file whole.

        Args:
            name: The file's name.
            limit: The most bytes that a real file of this kind has.

        Raises:
            CheckpointError: It is missing, or longer than the limit.
        """
        if self.size(name) > limit:
            raise damaged(self.location(name), "is too long to be a real one")
        return self.read_range(name, 0, limit)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Read some bytes of a file, fewer where the file ends before.

        Raises:
            CheckpointError: It is missing, or cannot be had.
        """
        length = max(0, min(length, self.size(name) - offset))
        cached = self._transport.cached(name)
        if cached is not None:
            with cached.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        return b"".join(self.fetch(name, offset, length))

    def fetch(
        self, name: str, offset: int, length: int, *, stop: threading.Event = _NEVER
    ) -> Iterator[bytes]:
        """The bytes of a range of a file, in pieces; a connection that breaks is resumed.

        Args:
            name: The file's name.
            offset: Where to start.
            length: How many bytes.
            stop: Set when they are not wanted any more.

        Raises:
            CheckpointError: They cannot be had.
        """
        attempt = 0
        while length:
            try:
                with self._transport.stream(name, offset, length) as pieces:
                    for piece in pieces:
                        received = piece[:length]
                        yield received
                        offset += len(received)
                        length -= len(received)
                        attempt = 0
                if length:
                    raise TransientError("the connection ended early")
            except TransientError as error:
                _pause(attempt, error, self.location(name), stop)
                attempt += 1

    def open(self, names: Iterable[str]) -> RemoteFiles:
        """Open files to read from them many times, in several threads.

        Raises:
            CheckpointError: One is missing, or the spool cannot be made.
        """
        wanted = list(names)
        paths = {name: self._transport.cached(name) for name in wanted}
        cached = {name: path for name, path in paths.items() if path is not None}
        sizes = {name: self.size(name) for name in wanted if name not in cached}
        return RemoteFiles(self, cached, sizes, self._spool_folder)

    def close(self) -> None:
        """Close connections."""
        self._transport.close()


class RemoteFiles:
    """Remote files that are read many times: a stream through a spool, single rows as they are."""

    def __init__(
        self, remote: Remote, cached: Mapping[str, Path], sizes: dict[str, int], spool: Path | None
    ) -> None:
        self._remote = remote
        self._sizes = sizes
        self._descriptors: dict[str, int] = {}
        # Where the latest reads ended: what begins there is read in order.
        self._ends: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        with ExitStack() as opened:
            for name, path in cached.items():
                descriptor = os.open(path, os.O_RDONLY)
                opened.callback(os.close, descriptor)
                self._descriptors[name] = descriptor
            if sizes:
                self._spool = Spool(spool, sizes, partial(remote.fetch, stop=self._stop))
                opened.callback(self._spool.close)
                opened.callback(self._stop.set)
            self._opened = opened.pop_all()

    def read_into(self, buffer: memoryview, name: str, offset: int) -> None:
        """Fill a buffer with the bytes of a file.

        Raises:
            CheckpointError: They cannot be had, or the file ends before.
        """
        if name in self._descriptors:
            where = f"{self._remote.location(name)} (in the Hub's cache)"
            fill(buffer, self._descriptors[name], offset, where)
        elif offset + len(buffer) > self._sizes[name]:
            raise damaged(self._remote.location(name), "ends before its last tensor")
        elif self._is_in_order(name, offset, len(buffer)):
            self._spool.read_into(buffer, name, offset)
        else:
            for piece in self._remote.fetch(name, offset, len(buffer)):
                buffer[: len(piece)] = piece
                buffer = buffer[len(piece) :]

    def _is_in_order(self, name: str, offset: int, length: int) -> bool:
        """Whether a read goes on where others ended, so that the next ones are worth fetching."""
        with self._lock:
            follows = (name, offset) in self._ends
            self._ends[name, offset + length] = None
            if len(self._ends) > _REMEMBERED_READS:
                self._ends.popitem(last=False)
        # The block at the start of a file holds its header, and its first tensor.
        return follows or offset < BLOCK_BYTES or self._spool.holds(name, offset)

    def close(self) -> None:
        """Close the files and give the spool's disk space back."""
        self._opened.close()
        self._descriptors.clear()
