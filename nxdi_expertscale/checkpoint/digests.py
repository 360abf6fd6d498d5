"""BLAKE3 digests of what is read and of what is written.

BLAKE3 because hashing is a good part of the work and it is more than twice as fast as SHA-256.
The digest of a file that is written is that of its bytes, as ``b3sum`` prints it. A file of
weights that is read is digested in chunks, by several workers in any order: a tensor's digest is
that of its chunks' digests, and the file's is that of its header's digest and its tensors' digests,
in the order of the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from blake3 import blake3

from nxdi_expertscale.sources.source import Source

_CHUNK_BYTES = 1 << 20


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Digest of bytes."""
    return blake3(data).digest()


def combine(digests: Iterable[bytes]) -> bytes:
    """Digest of a sequence of digests."""
    return digest(b"".join(digests))


def digest_file(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return digest_file_object(file)


def digest_file_object(file: FileIO) -> str:
    """Digest of the rest of an open file, in hexadecimal."""
    hasher = blake3()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):
        hasher.update(buffer[:count])
    return hasher.hexdigest()


def digest_source_file(source: Source, name: str) -> str:
    """Digest of a file of a source, in hexadecimal.

    Raises:
        CheckpointError: It cannot be read.
    """
    hasher = blake3()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    size, files = source.size(name), source.open([name])
    try:
        for offset in range(0, size, _CHUNK_BYTES):
            piece = buffer[: min(_CHUNK_BYTES, size - offset)]
            files.read_into(piece, name, offset)
            hasher.update(piece)
    finally:
        files.close()
    return hasher.hexdigest()
