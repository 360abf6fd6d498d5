"""A bounded store on disk for what is read of remote files: fetched some ahead, and not kept.

Files are cut into blocks. A block is fetched when it is wanted, and with it the next ones of the
same read; the block that was used longest ago makes room. The file has no name, so that nothing of
it is left however the process ends.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich import filesize

from nxdi_expertscale.errors import CheckpointError, parameter
from nxdi_expertscale.sources.folder import fill
from nxdi_expertscale.sources.user_cache import user_cache

BLOCK_BYTES = 16 << 20
MAX_BLOCKS = 128

SPOOL_BYTES = BLOCK_BYTES * MAX_BLOCKS
"""The most that a spool takes on its disk: 2.15 GB."""

FETCHERS = 8
"""Blocks that are fetched at a time: one connection alone does not fill a network."""

BLOCKS_AHEAD = 16

Key = tuple[str, int]
"""A block: the file's name, and the block's number in it."""

Fetch = Callable[[str, int, int], Iterator[bytes]]
"""Gives the bytes of a file from an offset on, of a length, in pieces."""


def spool_folder(folder: Path | None, *, beside: Path | None = None) -> Path:
    """The folder for what lies on this host meanwhile.

    Not the one for temporary files, which is memory on many hosts.

    Args:
        folder: What the user named, if anything.
        beside: A folder that is being made on this host, and need not be there yet.

    Returns:
        The user's folder; by default the one that is made, or the nearest above it that is there,
        or else one in the user's cache, which is made.

    Raises:
        CheckpointError: The one in the user's cache cannot be made.
        ConfigurationError: The user has no home folder.
    """
    if folder is not None:
        return folder
    if beside is not None:
        absolute = beside.absolute()
        return next(path for path in (absolute, *absolute.parents) if path.is_dir())
    cache = user_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{cache}: the spool cannot be written there ({error.strerror}); name another folder "
            f"with {parameter('spool')}"
        ) from None
    return cache


def is_in_memory(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether what is written to a folder stays in memory, as far as the system says so.

    Args:
        folder: The folder.
        mounts: The system's list of what is mounted (Linux, proc(5)).
    """
    try:
        device = folder.stat().st_dev
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    mounted = (line.split() for line in lines)
    return any(
        fields[2] == number and fields[fields.index("-") + 1] in {"tmpfs", "ramfs"}
        for fields in mounted
    )


@dataclass
class _Block:
    """A block that is in the spool, or on its way there.

    Attributes:
        slot: Its place in the file.
        fetched: Done once its bytes are there.
        readers: How many threads read it now.
    """

    slot: int
    fetched: Future[None] = field(default_factory=Future)
    readers: int = 0


class Spool:
    """Blocks of remote files in a file without a name. Safe to use from several threads."""

    def __init__(self, folder: Path | None, sizes: dict[str, int], fetch: Fetch) -> None:
        """Make the file.

        Args:
            folder: Where; by default see :func:`spool_folder`.
            sizes: Bytes of each file that is read, in the order in which they are.
            fetch: How their bytes are had.

        Raises:
            CheckpointError: The folder cannot be written, or its disk has too little space.
        """
        self._folder = spool_folder(folder)
        self._sizes = sizes
        self._fetch = fetch
        self._order = [
            (name, number) for name, size in sizes.items() for number in range(_blocks(size))
        ]
        self._places = {key: place for place, key in enumerate(self._order)}
        self._free_slots = list(range(min(MAX_BLOCKS, len(self._order))))
        self._check_space(spool_bytes(sizes.values()))
        self._blocks: OrderedDict[Key, _Block] = OrderedDict()
        self._changed = threading.Condition()
        self._is_closed = False
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(
                f"{self._folder}: the spool cannot be written there ({error.strerror}); name "
                f"another folder with {parameter('spool')}"
            ) from None
        self._fetchers = ThreadPoolExecutor(FETCHERS, "fetch")

    def _check_space(self, nbytes: int) -> None:
        if not self._folder.is_dir():
            raise CheckpointError(
                f"{self._folder}: is not a folder; name another with {parameter('spool')}"
            )
        free = shutil.disk_usage(self._folder).free
        if nbytes > free:
            raise CheckpointError(
                f"{self._folder}: the spool needs {filesize.decimal(nbytes)} and "
                f"{filesize.decimal(free)} are free; free some space or name a folder on another "
                f"disk with {parameter('spool')}"
            )

    def holds(self, name: str, offset: int) -> bool:
        """Whether the block at an offset of a file is there, on its way, or the next of one."""
        key = (name, offset // BLOCK_BYTES)
        with self._changed:
            return key in self._blocks or (name, key[1] - 1) in self._blocks

    def read_into(self, buffer: memoryview, name: str, offset: int) -> None:
        """Fill a buffer with the bytes of a file, which has to have as many.

        Raises:
            CheckpointError: They cannot be had.
        """
        while buffer:
            number, start = divmod(offset, BLOCK_BYTES)
            count = min(len(buffer), BLOCK_BYTES - start)
            with self._reading((name, number)) as block:
                position = block.slot * BLOCK_BYTES + start
                fill(buffer[:count], self._file.fileno(), position, str(self._folder))
            buffer = buffer[count:]
            offset += count

    @contextmanager
    def _reading(self, key: Key) -> Iterator[_Block]:
        """A block that stays while it is read; it is fetched if it is not there."""
        with self._changed:
            while (block := self._start(key)) is None:
                self._changed.wait()
            block.readers += 1
            self._blocks.move_to_end(key)
            place = self._places[key]
            for ahead in self._order[place + 1 : place + 1 + BLOCKS_AHEAD]:
                # None where all blocks are in use: it is fetched when it is wanted.
                self._start(ahead)
        try:
            block.fetched.result()
            yield block
        finally:
            with self._changed:
                block.readers -= 1
                has_failed = block.fetched.done() and block.fetched.exception() is not None
                # Whoever asks for it again tries again.
                if has_failed and not block.readers and self._blocks.get(key) is block:
                    del self._blocks[key]
                    self._free_slots.append(block.slot)
                self._changed.notify_all()

    def _start(self, key: Key) -> _Block | None:
        """A block, fetched or on its way; None where there is no room now."""
        if key in self._blocks:
            return self._blocks[key]
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            idle = (k for k, b in self._blocks.items() if not b.readers and b.fetched.done())
            oldest = next(idle, None)
            if oldest is None:
                return None
            slot = self._blocks.pop(oldest).slot
        block = self._blocks[key] = _Block(slot)
        self._fetchers.submit(self._bring, key, block)
        return block

    def _bring(self, key: Key, block: _Block) -> None:
        name, number = key
        try:
            offset = number * BLOCK_BYTES
            position = block.slot * BLOCK_BYTES
            length = min(BLOCK_BYTES, self._sizes[name] - offset)
            for piece in self._fetch(name, offset, length):
                if self._is_closed:
                    raise CheckpointError(f"{name}: is not read any more")
                _write_whole(self._file.fileno(), memoryview(piece), position)
                position += len(piece)
        except OSError as error:
            block.fetched.set_exception(self._disk_error(error))
        except BaseException as error:  # The thread that waits raises it.
            block.fetched.set_exception(error)
        else:
            block.fetched.set_result(None)
        with self._changed:
            self._changed.notify_all()

    def _disk_error(self, error: OSError) -> CheckpointError:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return CheckpointError(
                f"{self._folder}: the disk of the spool is full; free some space, or name another "
                f"folder with {parameter('spool')}, and run the same again"
            )
        return CheckpointError(
            f"{self._folder}: the spool cannot be written ({error.strerror}); check the disk"
        )

    def close(self) -> None:
        """Stop fetching, and give the disk's space back."""
        self._is_closed = True
        self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._file.close()


def spool_bytes(sizes: Iterable[int]) -> int:
    """The most that a spool takes for files of some sizes."""
    return min(MAX_BLOCKS, sum(map(_blocks, sizes))) * BLOCK_BYTES


def _blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _write_whole(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        data = data[count:]
        position += count
