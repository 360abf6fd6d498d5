"""Write the shards of a plan: pieces are read, converted and written by several workers.

The bytes of each piece have their place in a shard before anything is read, so the result does
not depend on who writes what when.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.chunks import row_ranges
from nxdi_expertscale.checkpoint.parallel import Meter, for_each
from nxdi_expertscale.checkpoint.read.files import Checkpoint, TensorReader
from nxdi_expertscale.checkpoint.read.values import TORCH_DTYPES, ValueReader, as_bytes
from nxdi_expertscale.checkpoint.write.manifest import SourceRecord, file_record
from nxdi_expertscale.checkpoint.write.plan import PlannedTensor, ShardPlan, Treatment
from nxdi_expertscale.checkpoint.write.provenance import digest_tensor
from nxdi_expertscale.checkpoint.write.staging import ShardRecord, Staging
from nxdi_expertscale.numerics import fp8
from nxdi_expertscale.version import __version__


def write_shards(
    source: Checkpoint,
    files: Mapping[str, SourceRecord],
    shards: Iterable[ShardPlan],
    staging: Staging,
    *,
    workers: int,
    meter: Meter,
) -> tuple[dict[str, ShardRecord], int]:
    """Write the shards that an earlier run has not finished.

    Args:
        source: What is read.
        files: The state of each of its files, by name.
        shards: What is to be written.
        staging: Where.
        workers: Threads.
        meter: Counts the bytes of the source.

    Returns:
        The record of each shard by its name, and how many were there already.

    Raises:
        CheckpointError: The source has NaN, infinity, or scales that are not positive.
        OSError: Reading or writing failed; what is finished stays.
    """
    records: dict[str, ShardRecord] = {}
    todo: list[tuple[ShardPlan, str]] = []
    for shard in shards:
        fingerprint = _fingerprint(shard, files)
        record = staging.finished(shard.name, fingerprint)
        if record is None:
            todo.append((shard, fingerprint))
        else:
            records[shard.name] = record
            meter.add(shard.source_bytes)
    resumed = len(records)
    with TensorReader(source) as reader, ThreadPoolExecutor(1) as finisher:
        values = ValueReader(source, reader)
        finished: list[Future[ShardRecord]] = []

        def work(piece: _Piece) -> None:
            scale = piece.planned.weight.scale
            if scale is not None and piece.number == 0:
                digest = digest_tensor(reader, scale.tensor)
                piece.shard.scale_digests[scale.tensor.name] = digest
            meter.add(_write_piece(piece, values))
            if piece.shard.piece_done():
                # Waiting for the disk is left to a thread that does nothing else.
                finished.append(finisher.submit(piece.shard.finish))

        opened: list[_OpenShard] = []
        try:
            for_each(work, _pieces(todo, staging, opened), workers)
            for future in finished:
                record = future.result()
                records[record.file.name] = record
        finally:
            finisher.shutdown()
            for open_shard in opened:
                open_shard.close()
    return records, resumed


def _fingerprint(shard: ShardPlan, files: Mapping[str, SourceRecord]) -> str:
    """Digest of all that the bytes of a shard follow from."""
    recipe: list[object] = [__version__, hashlib.sha256(shard.header).hexdigest()]
    used: set[str] = set()
    for planned in shard.tensors:
        tensor, scale = planned.weight.tensor, planned.weight.scale
        recipe.append([tensor.name, tensor.file, tensor.offset, tensor.pitch, tensor.dtype])
        used.add(tensor.file)
        if scale is not None:
            recipe.append([scale.tensor.file, scale.tensor.offset, scale.rows, scale.columns])
            used.add(scale.tensor.file)
    for name in sorted(used):
        recipe.append([name, files[name].size, files[name].mtime_ns])
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


class _OpenShard:
    """A shard that several workers write."""

    def __init__(self, plan: ShardPlan, fingerprint: str, staging: Staging) -> None:
        self.plan = plan
        self.digests: dict[str, list[bytes]] = {}
        self.scale_digests: dict[str, str] = {}
        self._fingerprint = fingerprint
        self._staging = staging
        self._path = staging.path(plan.name)
        self._pieces_left = 0
        for planned in plan.tensors:
            count = sum(1 for _ in row_ranges(planned.weight.tensor.shape))
            self.digests[planned.name] = [b""] * count
            self._pieces_left += count
        self._lock = threading.Lock()
        staging.forget(plan.name)
        self._file = self._path.open("wb", buffering=0)
        self.write(memoryview(plan.header), 0)

    def write(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._file.fileno(), data, offset)
            data = data[count:]
            offset += count

    def piece_done(self) -> bool:
        """Count a piece; whether it was the last."""
        with self._lock:
            self._pieces_left -= 1
            return self._pieces_left == 0

    def close(self) -> None:
        self._file.close()

    def finish(self) -> ShardRecord:
        """Put the shard on the disk and record that it is complete."""
        os.fsync(self._file.fileno())
        self.close()
        record = ShardRecord(
            fingerprint=self._fingerprint,
            file=file_record(self._path),
            source_digests={
                name: digests.combine(pieces).hex() for name, pieces in self.digests.items()
            }
            | self.scale_digests,
        )
        self._staging.finish(record)
        return record


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a tensor, and the shard that they go to."""

    shard: _OpenShard
    planned: PlannedTensor
    number: int
    rows: range


def _pieces(
    todo: Iterable[tuple[ShardPlan, str]], staging: Staging, opened: list[_OpenShard]
) -> Iterator[_Piece]:
    """The pieces of all shards; each shard is opened, and noted, when its first piece is due."""
    for plan, fingerprint in todo:
        shard = _OpenShard(plan, fingerprint, staging)
        opened.append(shard)
        for planned in plan.tensors:
            for number, rows in enumerate(row_ranges(planned.weight.tensor.shape)):
                yield _Piece(shard, planned, number, rows)


def _write_piece(piece: _Piece, reader: ValueReader) -> int:
    """Convert a piece and write it; the bytes that were read."""
    planned, weight, rows = piece.planned, piece.planned.weight, piece.rows
    stored = reader.stored(weight, rows)
    data = as_bytes(stored)
    piece.shard.digests[planned.name][piece.number] = digests.digest(data)
    if planned.treatment is Treatment.KEEP:
        if weight.tensor.dtype in TORCH_DTYPES:
            reader.expect_finite(weight.tensor, stored)
        _write(piece, planned.name, stored)
        return len(data)
    values = stored if weight.scale is None else reader.dequantized(stored, weight.scale, rows)
    if planned.treatment is Treatment.DEQUANTIZE:
        reader.expect_finite(weight.tensor, values)
        _write(piece, planned.name, values.to(TORCH_DTYPES[planned.dtype]))
        return len(data)
    shape = tuple(stored.shape)
    quantized, scale = fp8.quantize_per_channel(
        values,
        scratch=reader.buffers.take("values", shape),
        out=reader.buffers.take("quantized", shape),
    )
    reader.expect_finite(weight.tensor, scale)
    _write(piece, planned.name, quantized)
    _write(piece, planned.scale_name, scale)
    return len(data)


def _write(piece: _Piece, name: str, rows: torch.Tensor) -> None:
    data = as_bytes(rows)
    row_bytes = len(data) // len(piece.rows)
    piece.shard.write(data, piece.shard.plan.offsets[name] + piece.rows.start * row_bytes)
