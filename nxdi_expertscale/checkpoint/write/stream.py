"""Write the shards of a plan: chunks are read, converted and written by several workers.

Every byte has its place in a shard before anything is read, so the result does not depend on which
worker writes what, and when.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.parallel import for_each
from nxdi_expertscale.checkpoint.read.chunks import Chunk, chunks_of, row_ranges
from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.read.values import ValueReader, as_bytes
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.checkpoint.write.convert import RowConverter
from nxdi_expertscale.checkpoint.write.executor import Executor, Run, ShardTask
from nxdi_expertscale.checkpoint.write.plan import MAX_OPEN_SHARDS, PlannedTensor, ShardPlan
from nxdi_expertscale.checkpoint.write.provenance import SourceFile, digest_tensor
from nxdi_expertscale.checkpoint.write.staging import ShardRecord, ShardStore, Staging
from nxdi_expertscale.version import __version__


def write_shards(
    run: Run, shards: Sequence[ShardPlan], executor: Executor, *, workers: int
) -> tuple[dict[str, ShardRecord], int]:
    """Write the shards that an earlier run has not finished.

    Args:
        run: What is read, and where it is written.
        shards: What is to be written.
        executor: Who does it.
        workers: Threads that look at what is finished.

    Returns:
        The record of each shard by its name, and how many were there already.

    Raises:
        CheckpointError: The source has NaN, infinity, or scales that are not positive.
        OSError: Reading or writing failed; what is finished stays.
    """
    with TensorReader(run.source.files) as reader:
        records = _find_finished(shards, run.files, reader, run.staging, workers)
    resumed = len(records)
    run.staging.remove_unfinished()
    run.meter.add(sum(shard.source_bytes for shard in shards if shard.name in records))

    def finish(record: ShardRecord) -> None:
        run.staging.finish(record)
        records[record.file.name] = record

    todo = [
        ShardTask(shard, _identities(shard, run.files))
        for shard in shards
        if shard.name not in records
    ]
    if todo:
        executor.write(run, todo, finish)
    return records, resumed


@dataclass(frozen=True)
class LocalExecutor:
    """Threads of this process as an :class:`Executor`.

    Attributes:
        workers: How many.
    """

    workers: int

    def write(
        self, run: Run, tasks: Sequence[ShardTask], finish: Callable[[ShardRecord], None]
    ) -> None:
        """Write shards to the hidden folder; see :class:`Executor`."""
        stream_shards(
            run.source.files,
            tasks,
            run.staging,
            workers=self.workers,
            count=run.meter.add,
            finish=finish,
        )


def stream_shards(
    files: WeightFiles,
    tasks: Iterable[ShardTask],
    store: ShardStore,
    *,
    workers: int,
    count: Callable[[int], None],
    finish: Callable[[ShardRecord], None],
) -> None:
    """Read, convert and write shards, some at a time.

    Args:
        files: What is read.
        tasks: The shards; the next is asked for when there is work for it.
        store: Where they are written.
        workers: Threads.
        count: Called with bytes of the source that are done, from any thread.
        finish: Called with the record of each shard that is stored, one at a time.

    Raises:
        CheckpointError: The source has NaN, infinity, or scales that are not positive.
        OSError: Reading or writing failed.
    """
    with TensorReader(files) as reader, ThreadPoolExecutor(1) as finisher:
        converter = RowConverter(ValueReader(files, reader))
        finished: list[Future[None]] = []
        opened = _OpenShards()

        def work(item: _WorkItem) -> None:
            scale = item.planned.weight.scale
            if scale is not None and item.chunk.number == 0:
                digest = digest_tensor(reader, scale.tensor)
                item.shard.scale_digests[scale.tensor.name] = digest
            _convert_chunk(item, converter)
            count(item.chunk.nbytes)
            if item.shard.count_down():
                # Waiting for the disk is left to a thread that does nothing else.
                finished.append(finisher.submit(store_and_finish, item.shard))

        def work_or_stop(item: _WorkItem) -> None:
            try:
                work(item)
            except BaseException:
                opened.stop()
                raise

        def store_and_finish(shard: _OpenShard) -> None:
            try:
                finish(shard.store())
            except BaseException:
                opened.stop()
                raise
            opened.count_down()

        try:
            for_each(work_or_stop, _work_items(tasks, store, opened), workers)
            for future in finished:
                future.result()
        finally:
            finisher.shutdown()
            opened.close()


def _find_finished(
    shards: Iterable[ShardPlan],
    files: Mapping[str, SourceFile],
    reader: TensorReader,
    staging: Staging,
    workers: int,
) -> dict[str, ShardRecord]:
    """The shards that an earlier run has finished, whole, from the same bytes of the source."""
    records: dict[str, ShardRecord] = {}

    def look(shard: ShardPlan) -> None:
        record = staging.finished(shard.name, _recipe(shard))
        if record is None:
            return
        if record.source_identities == _identities(shard, files) or all(
            digest_tensor(reader, tensor) == record.source_digests.get(tensor.name)
            for tensor in _sources(shard)
        ):
            records[shard.name] = record
        else:
            staging.forget(shard.name)

    for_each(look, iter(shards), workers)
    return records


def _sources(shard: ShardPlan) -> Iterator[StoredTensor]:
    """The tensors of the source that a shard is made from, scales among them."""
    for planned in shard.tensors:
        yield planned.weight.tensor
        if planned.weight.scale is not None:
            yield planned.weight.scale.tensor


def _identities(shard: ShardPlan, files: Mapping[str, SourceFile]) -> dict[str, str]:
    """What the file system says of each file of the source that a shard is made from."""
    return {tensor.file: files[tensor.file].identity for tensor in _sources(shard)}


def _recipe(shard: ShardPlan) -> str:
    """Digest of what is done with which tensors; see :class:`ShardRecord`."""
    recipe: list[object] = [__version__, hashlib.sha256(shard.header).hexdigest()]
    for planned in shard.tensors:
        scale = planned.weight.scale
        recipe.append([planned.name, planned.treatment.value, planned.weight.tensor.dtype])
        if scale is not None:
            recipe.append([scale.tensor.name, scale.tensor.dtype, scale.rows, scale.columns])
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()


class _OpenShard:
    """A shard that several workers write."""

    def __init__(self, task: ShardTask, store: ShardStore) -> None:
        self.plan = plan = task.plan
        self.digests: dict[str, list[bytes]] = {}
        self.scale_digests: dict[str, str] = {}
        self.below_floor: set[str] = set()
        self.energies: dict[str, list[tuple[float, float]]] = {}
        self._identities = task.identities
        self._store = store
        self._chunks_left = 0
        for planned in plan.tensors:
            count = sum(1 for _ in row_ranges(planned.weight.tensor))
            self.digests[planned.name] = [b""] * count
            self.energies[planned.name] = []
            self._chunks_left += count
        self._lock = threading.Lock()
        self._file = store.create(plan.name)
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

    def store(self) -> ShardRecord:
        """Make sure that the shard is kept.

        Returns:
            Its record.
        """
        return ShardRecord(
            recipe=_recipe(self.plan),
            file=self._store.store(self.plan.name, self._file),
            source_digests={
                name: digests.combine(chunks).hex() for name, chunks in self.digests.items()
            }
            | self.scale_digests,
            source_identities=self._identities,
            below_floor=sorted(self.below_floor),
            # Exact sums: they do not depend on which thread came first.
            energies={
                name: (math.fsum(signal), math.fsum(noise))
                for name, parts in self.energies.items()
                if parts
                for signal, noise in [zip(*parts, strict=True)]
            },
        )


class _OpenShards:
    """The shards that are written: so many at a time, or they would pile up before a slow store."""

    def __init__(self) -> None:
        self._shards: list[_OpenShard] = []
        self._unfinished = 0
        self._is_stopped = False
        self._changed = threading.Condition()

    def wait_for_room(self) -> bool:
        """Wait until another shard may be opened.

        Returns:
            Whether it may; otherwise something failed, and none is opened any more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._unfinished < MAX_OPEN_SHARDS)
            return not self._is_stopped

    def add(self, shard: _OpenShard) -> None:
        with self._changed:
            self._shards.append(shard)
            self._unfinished += 1

    def count_down(self) -> None:
        """Count a shard as finished."""
        with self._changed:
            self._unfinished -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Open no more shards."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()


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
    tasks: Iterable[ShardTask], store: ShardStore, opened: _OpenShards
) -> Iterator[_WorkItem]:
    """The chunks of all shards; a shard is opened, and noted, when its first chunk is due."""
    for task in tasks:
        if not opened.wait_for_room():
            return
        shard = _OpenShard(task, store)
        opened.add(shard)
        for planned in task.plan.tensors:
            for chunk in chunks_of([planned.weight]):
                yield _WorkItem(shard, planned, chunk)


def _convert_chunk(item: _WorkItem, converter: RowConverter) -> None:
    """Read a chunk, convert it as planned, and write it."""
    converted = converter.convert(item.planned, item.chunk.rows)
    digest = digests.digest(as_bytes(converted.stored))
    item.shard.digests[item.planned.name][item.chunk.number] = digest
    if converted.is_below_floor:
        item.shard.below_floor.add(item.planned.name)
    if converted.energies is not None:
        item.shard.energies[item.planned.name].append(converted.energies)
    for name, rows in converted.outputs.items():
        item.write(name, rows)
