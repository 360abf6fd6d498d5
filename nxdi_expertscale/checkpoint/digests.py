"""Digests of what is read and of what is written.

A file that is written has the SHA-256 of its bytes, as ``sha256sum`` gives it. A file of weights
that is read is digested in pieces while several workers pass over it, in no order: its digest is
the SHA-256 of its header's and its tensors' digests in the order of the file, and a tensor's is
that of the digests of its pieces.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

PIECE_ELEMENTS = 1 << 20
"""Elements that are worked on at a time: what bounds memory, and enough to keep Python's own
time small. Part of the definition of a source's digest."""

_CHUNK_BYTES = 1 << 20


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as rows and columns: the last axis is that of the columns, if there are two."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def row_ranges(shape: tuple[int, ...]) -> Iterator[range]:
    """Cut a tensor into pieces of whole rows, of nearly the same size."""
    rows, columns = as_rows(shape)
    if rows * columns == 0:
        return
    pieces = -(-rows // max(1, PIECE_ELEMENTS // columns))
    step = -(-rows // pieces)
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))


def digest(data: bytes | memoryview) -> bytes:
    """SHA-256 of bytes."""
    return hashlib.sha256(data).digest()


def combine(digests: Iterable[bytes]) -> bytes:
    """Digest of a sequence of digests."""
    return hashlib.sha256(b"".join(digests)).digest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    sha = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha.update(buffer[:count])
    return sha.hexdigest()
