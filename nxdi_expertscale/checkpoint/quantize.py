"""Quantize a checkpoint in a stream: a few pieces in memory at a time, whatever its size."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nxdi_expertscale import fp8
from nxdi_expertscale.checkpoint import digests
from nxdi_expertscale.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    SourceRecord,
    file_record,
    normalized,
    render_json,
)
from nxdi_expertscale.checkpoint.plan import (
    FP8,
    Plan,
    PlannedTensor,
    ShardPlan,
    Treatment,
    make_plan,
)
from nxdi_expertscale.checkpoint.source import (
    CONFIG,
    INDEX,
    Checkpoint,
    TensorReader,
    checked_file,
    companions,
    open_checkpoint,
)
from nxdi_expertscale.checkpoint.staging import WORK, ShardRecord, Staging
from nxdi_expertscale.checkpoint.tensor_file import StoredTensor
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.families import require_family
from nxdi_expertscale.plugins import known_families
from nxdi_expertscale.version import __version__

MAX_SHARD_BYTES = 2 << 30
"""Size of the files of weights. An interrupted run loses no more than the file it was at."""

MAX_WORKERS = 32
"""More gain nothing: Python's own part of the work is done by one at a time."""

Progress = Callable[[int, int], None]
"""Called with the bytes of the source that are done, and with all of them."""

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    FP8: torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class QuantizationResult:
    """What a run made.

    Attributes:
        destination: The finished folder.
        source_bytes: Bytes of the source's files of weights.
        output_bytes: Bytes of the files of weights that were written.
        seconds: How long it took.
        tensors: How many tensors there are of each kind: ``quantized experts``,
            ``quantized linears``, ``dequantized`` and ``kept``.
        shards: Number of files of weights.
        resumed_shards: How many of them an earlier run had finished.
        modules_to_not_convert: Modules that were left as they are.
        unused_exclusions: Names in it that no module of the checkpoint has in its path.
    """

    destination: Path
    source_bytes: int
    output_bytes: int
    seconds: float
    tensors: Mapping[str, int]
    shards: int
    resumed_shards: int
    modules_to_not_convert: tuple[str, ...]
    unused_exclusions: tuple[str, ...]


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    modules_to_not_convert: Sequence[str] = (),
    workers: int | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> QuantizationResult:
    """Make an FP8 checkpoint with one scale for each output channel of each expert.

    The output is what NxDI loads and what Hugging Face's tools understand (compressed-tensors).
    It does not depend on ``workers``. Cut off at any moment, the folder cannot be loaded, and the
    same call goes on from the files that were finished.

    Args:
        src: A checkpoint's folder: ``config.json`` and safetensors files.
        dst: The folder to make; new, empty, or one that an earlier call made or began.
        modules_to_not_convert: Modules that stay as they are, in the names of the checkpoint or
            of NxDI's modules; see :meth:`~nxdi_expertscale.families.MoEFamily.excludes`. The
            router is never converted.
        workers: Threads; by default as many as there are cores for this process.
        overwrite: Replace a finished folder. The old one stays until the new one is complete.
        max_shard_bytes: Size of the files of weights.
        progress: Called with bytes of the source that are done, and all of them.

    Raises:
        CheckpointError: The source is malformed or not supported, the destination is taken, or
            there is too little space.
        ConfigurationError: A setting is not possible.
    """
    started = time.perf_counter()
    _check_settings(modules_to_not_convert, workers, max_shard_bytes)
    source = open_checkpoint(src)
    family = require_family(
        source.config.get("model_type"), known_families(), str(source.folder / CONFIG)
    )
    plan = make_plan(source, family, modules_to_not_convert, max_shard_bytes)
    destination = Path(dst).absolute()
    _check_destination(source, destination, overwrite)
    _check_space(plan, destination)
    with Staging(destination) as staging:
        if staging.is_complete:
            staging.publish()
        run = _Run(source, plan, staging, progress)
        resumed = run.write_shards(workers or _available_cores())
        _write_others(run, staging, source, plan, normalized(modules_to_not_convert))
        staging.publish()
    return QuantizationResult(
        destination=destination,
        source_bytes=source.nbytes,
        output_bytes=sum(shard.nbytes for shard in plan.shards),
        seconds=time.perf_counter() - started,
        tensors=count_tensors(plan),
        shards=len(plan.shards),
        resumed_shards=resumed,
        modules_to_not_convert=plan.exclusions,
        unused_exclusions=plan.unused_exclusions,
    )


def _check_settings(
    modules_to_not_convert: Sequence[str], workers: int | None, max_shard_bytes: int
) -> None:
    if isinstance(modules_to_not_convert, str):
        raise ConfigurationError(
            "modules_to_not_convert: is one string; give a list of module names"
        )
    if any(not name.strip() for name in modules_to_not_convert):
        raise ConfigurationError(
            "modules_to_not_convert: an empty name would exclude every module; remove it"
        )
    if workers is not None and workers < 1:
        raise ConfigurationError(f"workers: {workers} cannot work; give 1 or more")
    if max_shard_bytes < 1:
        raise ConfigurationError(f"max_shard_bytes: {max_shard_bytes} is not a size")


def _check_destination(source: Checkpoint, destination: Path, overwrite: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file; name a folder")
    if not destination.is_dir():
        return
    if destination.resolve() == source.folder:
        raise CheckpointError(f"{destination}: is the source itself; name another folder")
    if (destination / WORK / MANIFEST).is_file():
        return
    if (destination / MANIFEST).is_file():
        if not overwrite:
            raise CheckpointError(
                f"{destination}: is a finished checkpoint; name another folder, or overwrite it "
                "with --overwrite"
            )
    elif any(path.name != WORK for path in destination.iterdir()):
        raise CheckpointError(
            f"{destination}: is not empty and was not made by nxdi-expertscale; name another "
            "folder, or remove what is in it"
        )


def _check_space(plan: Plan, destination: Path) -> None:
    folder = destination
    while not folder.exists():
        folder = folder.parent
    written = 0
    if (destination / WORK).is_dir():
        written = sum(
            path.stat().st_blocks * 512 for path in (destination / WORK).glob("*.safetensors")
        )
    needed = sum(shard.nbytes for shard in plan.shards) - written
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{destination}: needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; free "
            "some space or name a folder on another disk"
        )


def _available_cores() -> int:
    return min(len(os.sched_getaffinity(0)), MAX_WORKERS)


def count_tensors(plan: Plan) -> dict[str, int]:
    """How many tensors there are of each kind."""
    kinds = Counter(
        f"quantized {'experts' if tensor.is_expert else 'linears'}"
        if tensor.treatment is Treatment.QUANTIZE
        else tensor.treatment.value
        for tensor in plan.tensors
    )
    names = ("quantized experts", "quantized linears", "dequantized", "kept")
    return {name: kinds[name] for name in names}


def fingerprint(shard: ShardPlan, files: Mapping[str, SourceRecord]) -> str:
    """Digest of all that the bytes of a shard follow from."""
    sources = sorted(
        {tensor.source.file for tensor in shard.tensors}
        | {tensor.scale.file for tensor in shard.tensors if tensor.scale is not None}
    )
    recipe = [
        [
            tensor.source.name,
            tensor.source.offset,
            tensor.source.dtype,
            tensor.treatment.value,
            tensor.dtype,
            tensor.block,
            tensor.scale.name if tensor.scale is not None else None,
            tensor.scale.offset if tensor.scale is not None else None,
        ]
        for tensor in shard.tensors
    ]
    states = [[files[name].name, files[name].size, files[name].mtime_ns] for name in sources]
    header = hashlib.sha256(shard.header).hexdigest()
    return hashlib.sha256(json.dumps([__version__, header, states, recipe]).encode()).hexdigest()


class _OpenShard:
    """A shard that is being written, by several workers."""

    def __init__(self, plan: ShardPlan, path: Path) -> None:
        self.plan = plan
        self.path = path
        self.digests: dict[str, list[bytes]] = {}
        self._pieces_left = 0
        for tensor in plan.tensors:
            count = sum(1 for _ in digests.row_ranges(tensor.source.shape))
            self.digests[tensor.source.name] = [b""] * count
            self._pieces_left += count
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self.write(plan.header, 0)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view = view[count:]
            offset += count

    def piece_done(self) -> bool:
        """Count a piece; whether it was the last."""
        with self._lock:
            self._pieces_left -= 1
            return self._pieces_left == 0

    def close(self) -> None:
        os.fsync(self._descriptor)
        os.close(self._descriptor)


@dataclass
class _Piece:
    shard: _OpenShard
    tensor: PlannedTensor
    number: int
    rows: range


@dataclass
class _Buffers(threading.local):
    """A worker's memory, used again for each piece."""

    raw: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    quantized: torch.Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.float8_e4m3fn)
    )

    def take(self, name: str, count: int) -> torch.Tensor:
        buffer: torch.Tensor = getattr(self, name)
        if buffer.numel() < count:
            buffer = torch.empty(count, dtype=buffer.dtype)
            setattr(self, name, buffer)
        return buffer[:count]


class _Run:
    """One pass over a source."""

    def __init__(
        self, source: Checkpoint, plan: Plan, staging: Staging, progress: Progress | None
    ) -> None:
        self._source = source
        self._plan = plan
        self._staging = staging
        self._progress = progress
        self._files = {name: _source_state(source, name) for name in (*source.headers, CONFIG)}
        self._buffers = _Buffers()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done = 0
        self._total = sum(tensor.source.nbytes for tensor in plan.tensors)
        self.shards: dict[str, ShardRecord] = {}

    def write_shards(self, workers: int) -> int:
        """Write all shards; the number of those that were there already."""
        todo: list[ShardPlan] = []
        for shard in self._plan.shards:
            record = self._staging.finished(shard.name, fingerprint(shard, self._files))
            if record is None:
                todo.append(shard)
            else:
                self.shards[shard.name] = record
                self._advance(sum(tensor.source.nbytes for tensor in shard.tensors))
        resumed = len(self.shards)
        threads = torch.get_num_threads()
        try:
            with TensorReader(self._source) as reader, ThreadPoolExecutor(workers) as pool:
                pieces = self._pieces(todo)
                jobs = [pool.submit(self._work, reader, pieces) for _ in range(workers)]
                try:
                    wait(jobs, return_when=FIRST_EXCEPTION)
                finally:
                    self._stop.set()
                for job in jobs:
                    job.result()
        finally:
            torch.set_num_threads(threads)
        return resumed

    def _pieces(self, shards: Sequence[ShardPlan]) -> Iterator[_Piece]:
        for shard in shards:
            self._staging.forget(shard.name)
            open_shard = _OpenShard(shard, self._staging.path(shard.name))
            for tensor in shard.tensors:
                for number, rows in enumerate(digests.row_ranges(tensor.source.shape)):
                    yield _Piece(open_shard, tensor, number, rows)

    def _work(self, reader: TensorReader, pieces: Iterator[_Piece]) -> None:
        torch.set_num_threads(1)
        try:
            while not self._stop.is_set():
                with self._lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                self._write_piece(reader, piece)
                self._advance(piece.tensor.source.nbytes * len(piece.rows) // _rows(piece))
                if piece.shard.piece_done():
                    self._finish(piece.shard)
        except BaseException:
            self._stop.set()
            raise

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _write_piece(self, reader: TensorReader, piece: _Piece) -> None:
        tensor, source = piece.tensor, piece.tensor.source
        rows, columns = digests.as_rows(source.shape)
        row_bytes = source.nbytes // rows
        raw = self._buffers.take("raw", len(piece.rows) * row_bytes)
        reader.read_into(_bytes(raw), source.file, source.offset + piece.rows.start * row_bytes)
        piece.shard.digests[source.name][piece.number] = digests.digest(_bytes(raw))
        offset = piece.shard.plan.offsets[source.name]
        shape = (len(piece.rows), columns)
        if tensor.treatment is Treatment.KEEP:
            if source.dtype in TORCH_DTYPES:
                self._expect_finite(source, raw.view(TORCH_DTYPES[source.dtype]))
            piece.shard.write(_bytes(raw), offset + piece.rows.start * row_bytes)
            return
        stored = raw.view(TORCH_DTYPES[source.dtype]).view(shape)
        values = self._buffers.take("values", stored.numel()).view(shape)
        if tensor.scale is not None and tensor.block is not None:
            values.copy_(stored)
            scale = self._read_scale(reader, tensor, tensor.scale, tensor.block, piece.rows)
            fp8.scale_blocks_(values, scale, tensor.block[1])
            stored = values
        if tensor.treatment is Treatment.DEQUANTIZE:
            self._expect_finite(source, values)
            dtype = TORCH_DTYPES[tensor.dtype]
            full = values.to(dtype)
            piece.shard.write(_bytes(full), offset + piece.rows.start * columns * dtype.itemsize)
            return
        quantized = self._buffers.take("quantized", stored.numel()).view(shape)
        quantized, scale = fp8.quantize_per_channel(stored, scratch=values, out=quantized)
        self._expect_finite(source, scale)
        piece.shard.write(_bytes(quantized), offset + piece.rows.start * columns)
        scale_offset = piece.shard.plan.offsets[tensor.scale_name]
        piece.shard.write(_bytes(scale), scale_offset + piece.rows.start * scale.itemsize)

    def _read_scale(
        self,
        reader: TensorReader,
        tensor: PlannedTensor,
        scale: StoredTensor,
        block: tuple[int, int],
        rows: range,
    ) -> torch.Tensor:
        """The source's scales for some rows, ``[rows, blocks of columns]``."""
        raw = torch.empty(scale.nbytes, dtype=torch.uint8)
        reader.read_into(_bytes(raw), scale.file, scale.offset)
        values = raw.view(TORCH_DTYPES[scale.dtype]).to(torch.float32)
        if not bool((torch.isfinite(values) & (values > 0)).all()):
            raise CheckpointError(
                f"{self._source.folder / scale.file}: {scale.name}: has a scale that is not a "
                "positive number; download the file again"
            )
        columns = -(-tensor.source.shape[1] // block[1])
        indices = torch.arange(rows.start, rows.stop) // block[0]
        return values.view(-1, columns)[indices]

    def _expect_finite(self, tensor: StoredTensor, values: torch.Tensor) -> None:
        extremes = torch.stack([values.amax(), values.amin()])
        if not bool(torch.isfinite(extremes).all()):
            raise CheckpointError(
                f"{self._source.folder / tensor.file}: {tensor.name}: has NaN or infinity; "
                "download the file again"
            )

    def _finish(self, shard: _OpenShard) -> None:
        shard.close()
        record = ShardRecord(
            fingerprint=fingerprint(shard.plan, self._files),
            file=file_record(shard.path),
            source_digests={
                name: digests.combine(pieces).hex() for name, pieces in shard.digests.items()
            },
        )
        self._staging.finish(record)
        self.shards[shard.plan.name] = record

    def source_records(self) -> tuple[SourceRecord, ...]:
        """The files that were read, with the digests of their contents."""
        of_tensors = {
            name: bytes.fromhex(value)
            for record in self.shards.values()
            for name, value in record.source_digests.items()
        }
        return source_records(self._source, self._files, of_tensors)


def source_records(
    source: Checkpoint, files: Mapping[str, SourceRecord], of_tensors: Mapping[str, bytes]
) -> tuple[SourceRecord, ...]:
    """Complete the records of a source's files with the digests of their contents."""
    parts = {name: [digests.digest(header)] for name, header in source.headers.items()}
    for tensor in source.tensors.values():
        parts[tensor.file].append(of_tensors[tensor.name])
    return tuple(
        SourceRecord(
            state.name,
            state.size,
            state.mtime_ns,
            digests.combine(parts[name]).hex() if name in parts else state.digest,
        )
        for name, state in sorted(files.items())
    )


def _rows(piece: _Piece) -> int:
    return digests.as_rows(piece.tensor.source.shape)[0]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _source_state(source: Checkpoint, name: str) -> SourceRecord:
    path = checked_file(source.folder, name)
    status = path.stat()
    digest = "" if name in source.headers else digests.file_sha256(path)
    return SourceRecord(name, status.st_size, status.st_mtime_ns, digest)


def _write_others(
    run: _Run, staging: Staging, source: Checkpoint, plan: Plan, exclusions: tuple[str, ...]
) -> None:
    names = companions(source.folder, leave_out=[MANIFEST])
    for name in names:
        staging.write(name, checked_file(source.folder, name).read_bytes())
    staging.write(CONFIG, render_json(plan.config))
    staging.write(INDEX, render_json(plan.index))
    manifest = Manifest(
        version=__version__,
        model_type=str(source.config["model_type"]),
        modules_to_not_convert=exclusions,
        source=run.source_records(),
        tensors=count_tensors(plan),
        shards=tuple(run.shards[shard.name].file for shard in plan.shards),
        files=tuple(file_record(staging.path(name)) for name in [*names, CONFIG, INDEX]),
    )
    staging.write(MANIFEST, manifest.to_json())
