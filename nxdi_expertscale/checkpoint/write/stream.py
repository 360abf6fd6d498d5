"""Write the shards of a plan: chunks are read, converted and written by several workers.

Every byte has its place in a shard before anything is read, so the result does not depend on which
worker writes what, and when.
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
from nxdi_expertscale.checkpoint.parallel import Meter, for_each
from nxdi_expertscale.checkpoint.read.chunks import Chunk, chunks_of, row_ranges
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.read.values import ValueReader, as_bytes
from nxdi_expertscale.checkpoint.write.convert import RowConverter
from nxdi_expertscale.checkpoint.write.manifest import SourceRecord, file_record
from nxdi_expertscale.checkpoint.write.plan import PlannedTensor, ShardPlan
from nxdi_expertscale.checkpoint.write.provenance import digest_tensor
from nxdi_expertscale.checkpoint.write.staging import ShardRecord, Staging
from nxdi_expertscale.version import __version__


def write_shards(
    source: Model,
    state: Mapping[str, SourceRecord],
    shards: Iterable[ShardPlan],
    staging: Staging,
    *,
    workers: int,
    meter: Meter,
) -> tuple[dict[str, ShardRecord], int]:
    """Write the shards that an earlier run has not finished.

    Args:
        source: What is read.
        state: The state of each of its files, by name.
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
        fingerprint = _fingerprint(shard, state)
        record = staging.finished(shard.name, fingerprint)
        if record is None:
            todo.append((shard, fingerprint))
        else:
            records[shard.name] = record
            meter.add(shard.source_bytes)
    resumed = len(records)
    with TensorReader(source.files) as reader, ThreadPoolExecutor(1) as finisher:
        converter = RowConverter(ValueReader(source.files, reader))
        finished: list[Future[ShardRecord]] = []

        def work(item: _WorkItem) -> None:
            scale = item.planned.weight.scale
            if scale is not None and item.chunk.number == 0:
                digest = digest_tensor(reader, scale.tensor)
                item.shard.scale_digests[scale.tensor.name] = digest
            _convert_chunk(item, converter)
            meter.add(item.chunk.nbytes)
            if item.shard.count_down():
                # Waiting for the disk is left to a thread that does nothing else.
                finished.append(finisher.submit(item.shard.finish))

        opened: list[_OpenShard] = []
        try:
            for_each(work, _work_items(todo, staging, opened), workers)
            for future in finished:
                record = future.result()
                records[record.file.name] = record
        finally:
            finisher.shutdown()
            for open_shard in opened:
                open_shard.close()
    return records, resumed


def _fingerprint(shard: ShardPlan, state: Mapping[str, SourceRecord]) -> str:
    """Digest of all that the bytes of a shard depend on."""
    recipe: list[object] = [__version__, hashlib.sha256(shard.header).hexdigest()]
    used: set[str] = set()
    for planned in shard.tensors:
        tensor, scale = planned.weight.tensor, planned.weight.scale
        recipe.append([tensor.name, tensor.file, tensor.offset, tensor.stride, tensor.dtype])
        used.add(tensor.file)
        if scale is not None:
            recipe.append([scale.tensor.file, scale.tensor.offset, scale.rows, scale.columns])
            used.add(scale.tensor.file)
    for name in sorted(used):
        recipe.append([name, state[name].size, state[name].mtime_ns])
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
        self._chunks_left = 0
        for planned in plan.tensors:
            count = sum(1 for _ in row_ranges(planned.weight.tensor))
            self.digests[planned.name] = [b""] * count
            self._chunks_left += count
        self._lock = threading.Lock()
        staging.forget(plan.name)
        self._file = self._path.open("wb", buffering=0)
        self.write(memoryview(plan.header), 0)

    def write(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._file.fileno(), data, offset)
            data = data[count:]
            offset += count

    def count_down(self) -> bool:
        """Count a chunk as written.

        Returns:
            Whether it was the last.
        """
        with self._lock:
            self._chunks_left -= 1
            return self._chunks_left == 0

    def close(self) -> None:
        self._file.close()

    def finish(self) -> ShardRecord:
        """Flush the shard to the disk and record that it is complete."""
        os.fsync(self._file.fileno())
        self.close()
        record = ShardRecord(
            fingerprint=self._fingerprint,
            file=file_record(self._path),
            source_digests={
                name: digests.combine(chunks).hex() for name, chunks in self.digests.items()
            }
            | self.scale_digests,
        )
        self._staging.finish(record)
        return record


@dataclass(frozen=True, slots=True)
class _WorkItem:
    """A chunk of a tensor of the source, what is done with it, and the shard that it goes to."""

    shard: _OpenShard
    planned: PlannedTensor
    chunk: Chunk

    def write(self, name: str, rows: torch.Tensor) -> None:
        """Write the rows of the chunk to their place in a tensor of the shard."""
        data = as_bytes(rows)
        start = self.chunk.rows.start * (len(data) // len(self.chunk.rows))
        self.shard.write(data, self.shard.plan.offsets[name] + start)


def _work_items(
    todo: Iterable[tuple[ShardPlan, str]], staging: Staging, opened: list[_OpenShard]
) -> Iterator[_WorkItem]:
    """The chunks of all shards; a shard is opened, and noted, when its first chunk is due."""
    for plan, fingerprint in todo:
        shard = _OpenShard(plan, fingerprint, staging)
        opened.append(shard)
        for planned in plan.tensors:
            for chunk in chunks_of([planned.weight]):
                yield _WorkItem(shard, planned, chunk)


def _convert_chunk(item: _WorkItem, converter: RowConverter) -> None:
    """Read a chunk, convert it as planned, and write it."""
    converted = converter.convert(item.planned, item.chunk.rows)
    digest = digests.digest(as_bytes(converted.stored))
    item.shard.digests[item.planned.name][item.chunk.number] = digest
    for name, rows in converted.outputs.items():
        item.write(name, rows)
