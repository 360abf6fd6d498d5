"""What a run of ``quantize`` would make and take, found out without reading a weight.

The plan is the one that the run would follow. How long it takes, and how much memory, is measured
on some of its chunks with made-up values of the same dtypes and shapes.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.parallel import available_cores, for_each
from nxdi_expertscale.checkpoint.quantize import check_settings
from nxdi_expertscale.checkpoint.read.auxiliary import find_auxiliary_files
from nxdi_expertscale.checkpoint.read.chunks import Chunk, chunks_of
from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.checkpoint.read.values import ValueReader, as_bytes
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.checkpoint.write.convert import RowConverter
from nxdi_expertscale.checkpoint.write.full_precision import KeptTensors, explain_kept
from nxdi_expertscale.checkpoint.write.locate import open_destination, spool_for
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST
from nxdi_expertscale.checkpoint.write.plan import (
    MAX_SHARD_BYTES,
    Plan,
    PlannedTensor,
    check_readable,
    make_plan,
)
from nxdi_expertscale.sources.locate import open_source
from nxdi_expertscale.sources.spool import spool_bytes

SAMPLE_BYTES = 64 << 20
"""Bytes of the source that are converted to measure how quick that is."""

_ANY_VALUE = b"\x38"
"""In each byte, a finite and positive number of every dtype that is read."""


@dataclass(frozen=True)
class DryRun:
    """What a run would make and take.

    Attributes:
        source: What is read.
        origin: What that is, pinned to a revision; None for a folder.
        destination: What would be made.
        model_type: The model's type, as its config has it.
        family: The family that it belongs to.
        scheme: How the source is quantized; None if it is not.
        source_bytes: Bytes of the source's files of weights.
        output_bytes: Bytes of the files of weights that would be written.
        shards: Number of those files.
        tensors: How many tensors there are of each kind.
        in_full_precision: What is not quantized, and why.
        limits: What NxDI itself computes wrongly, or cannot load, of this model.
        code_left_out: Scripts, binaries and ``auto_map`` of configs, which would not be copied.
        mtp_left_out: Number of tensors that predict further tokens, and would be left out.
        disk_bytes: Bytes that are still to be written, or for S3 those that wait at a time.
        disk_free_bytes: Bytes that are free there: on the destination's disk, or for S3 on this
            host's.
        spool_bytes: The most that lies in the spool at a time; 0 where the source is a folder.
        workers: Threads.
        memory_bytes: Memory of the process, as it was when the sample was converted.
        bytes_per_second: Bytes of the source that were converted in a second.
        seconds: The time to convert all of it at this rate.
    """

    source: str
    origin: str | None
    destination: Path | str
    model_type: str
    family: str
    scheme: str | None
    source_bytes: int
    output_bytes: int
    shards: int
    tensors: Mapping[str, int]
    in_full_precision: tuple[KeptTensors, ...]
    limits: tuple[str, ...]
    code_left_out: tuple[str, ...]
    mtp_left_out: int
    disk_bytes: int
    disk_free_bytes: int
    spool_bytes: int
    workers: int
    memory_bytes: int
    bytes_per_second: float
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the destination's disk has room for it."""
        return self.disk_bytes <= self.disk_free_bytes


def run_dry(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    modules_to_not_convert: Sequence[str] = (),
    workers: int | None = None,
    overwrite: bool = False,
    keep_mtp: bool = False,
    spool: Path | None = None,
) -> DryRun:
    """Find out what ``quantize`` would make of a checkpoint; no weight is read, nothing written.

    The arguments are those of :func:`~nxdi_expertscale.checkpoint.quantize_checkpoint`.

    Raises:
        CheckpointError: The source is malformed or not supported, or the destination is taken.
        ConfigurationError: A setting is not possible.
    """
    check_settings(modules_to_not_convert, workers, MAX_SHARD_BYTES)
    meanwhile = spool_for(dst, spool)
    destination = open_destination(dst, meanwhile)
    threads = workers or available_cores()
    with open_source(src, spool=meanwhile) as source:
        model = open_model(source, keep_mtp=keep_mtp)
        plan = make_plan(model, modules_to_not_convert, MAX_SHARD_BYTES)
        check_readable(plan)
        destination.check(model, overwrite=overwrite)
        auxiliary = find_auxiliary_files(source, leave_out=[MANIFEST])
    space = destination.space(plan.nbytes)
    rate = _measure_rate(model, plan, threads)
    sizes = [] if isinstance(source.path, Path) else map(source.size, model.files.headers)
    return DryRun(
        source=str(source.path),
        origin=source.origin,
        destination=destination.path,
        model_type=model.config.model_type,
        family=model.family.name,
        scheme=model.scheme.name if model.scheme is not None else None,
        source_bytes=model.files.nbytes,
        output_bytes=plan.nbytes,
        shards=len(plan.shards),
        tensors=plan.count_kinds(),
        in_full_precision=explain_kept(model, plan, modules_to_not_convert),
        limits=tuple(
            f"{limit.problem}; {limit.remedy}" for limit in model.family.limits_of(model.config.raw)
        ),
        code_left_out=auxiliary.code,
        mtp_left_out=model.mtp_left_out,
        disk_bytes=space.needed,
        disk_free_bytes=space.free,
        spool_bytes=spool_bytes(sizes),
        workers=threads,
        memory_bytes=_memory_bytes(),
        bytes_per_second=rate,
        seconds=plan.source_bytes / rate,
    )


class _MadeUpValues:
    """Stands for a reader of the source's files: any values, of the dtype that is asked for."""

    def read_into(self, buffer: memoryview, _file: str, _offset: int) -> None:
        buffer[:] = _ANY_VALUE * len(buffer)

    def read_rows_into(self, buffer: memoryview, _tensor: StoredTensor, _rows: range) -> None:
        buffer[:] = _ANY_VALUE * len(buffer)


def _measure_rate(model: Model, plan: Plan, workers: int) -> float:
    """Bytes of the source that are converted in a second, by so many threads."""
    converter = RowConverter(
        ValueReader(model.files, _MadeUpValues()), exceeds_range=lambda _weight: True
    )
    sample = _sample(plan)

    def work(item: tuple[PlannedTensor, Chunk]) -> None:
        planned, chunk = item
        digests.digest(as_bytes(converter.convert(planned, chunk.rows).stored))

    # Once more than is measured: the first pass takes memory from the system.
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for_each(work, iter(sample), workers)
        seconds = time.perf_counter() - started
    return sum(chunk.nbytes for _, chunk in sample) / max(seconds, 1e-9)


def _sample(plan: Plan) -> list[tuple[PlannedTensor, Chunk]]:
    """Chunks from everywhere in a plan, about :data:`SAMPLE_BYTES` of the source."""
    chunks = (
        (planned, chunk)
        for shard in plan.shards
        for planned in shard.tensors
        for chunk in chunks_of([planned.weight])
    )
    return list(islice(chunks, 0, None, max(1, plan.source_bytes // SAMPLE_BYTES)))


def _memory_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
