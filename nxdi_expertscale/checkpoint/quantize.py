"""Quantize a checkpoint: check what can be checked, plan, stream, publish."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nxdi_expertscale.checkpoint.parallel import Meter, Progress, available_cores
from nxdi_expertscale.checkpoint.read.files import (
    CONFIG,
    INDEX,
    Checkpoint,
    companions,
    read_companion,
)
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.write.manifest import (
    MANIFEST,
    Manifest,
    file_record,
    normalized,
    read_manifest,
    render_json,
)
from nxdi_expertscale.checkpoint.write.plan import Plan, make_plan
from nxdi_expertscale.checkpoint.write.provenance import (
    expect_unchanged,
    mismatch_of,
    source_records,
    source_state,
)
from nxdi_expertscale.checkpoint.write.staging import WORK, Staging, digests_of_tensors, is_complete
from nxdi_expertscale.checkpoint.write.stream import write_shards
from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.version import __version__

MAX_SHARD_BYTES = 1_000_000_000
"""Size of the files of weights. A run that is cut off loses no more than those it was at."""


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
            of NxDI's modules; see :func:`~nxdi_expertscale.families.exclusions.is_excluded`. The
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
    source, family = open_model(src)
    plan = make_plan(source, family, modules_to_not_convert, max_shard_bytes)
    destination = Path(dst).absolute()
    _check_destination(source, destination, overwrite)
    _check_space(plan, destination)
    meter = Meter(sum(shard.source_bytes for shard in plan.shards), progress)
    with _explained(destination), Staging(destination) as staging:
        # What an earlier run had complete and not yet moved is this run's result, if it fits.
        if staging.publish() and (
            mismatch_of(read_manifest(destination), source, modules_to_not_convert) is None
        ):
            resumed = len(plan.shards)
        else:
            _check_destination(source, destination, overwrite)
            state = source_state(source)
            records, resumed = write_shards(
                source,
                state,
                plan.shards,
                staging,
                workers=workers or available_cores(),
                meter=meter,
            )
            names = _write_companions(staging, source, plan)
            expect_unchanged(source, state)
            manifest = Manifest(
                version=__version__,
                model_type=str(source.config["model_type"]),
                modules_to_not_convert=normalized(modules_to_not_convert),
                source=source_records(source, state, digests_of_tensors(records.values())),
                tensors=plan.count_kinds(),
                shards=tuple(records[shard.name].file for shard in plan.shards),
                files=tuple(file_record(staging.path(name)) for name in names),
            )
            staging.write(MANIFEST, manifest.to_json())
            staging.publish()
    return QuantizationResult(
        destination=destination,
        source_bytes=source.nbytes,
        output_bytes=plan.nbytes,
        seconds=time.perf_counter() - started,
        tensors=plan.count_kinds(),
        shards=len(plan.shards),
        resumed_shards=resumed,
        modules_to_not_convert=plan.exclusions,
        unused_exclusions=plan.unused_exclusions,
    )


@contextmanager
def _explained(destination: Path) -> Iterator[None]:
    """Say of a disk that is full, or fails, which it is and what to do: the system may not."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            what, remedy = "the disk is full", "free some space"
        elif error.filename is None:
            what, remedy = f"cannot be written ({error.strerror})", "check the disk"
        else:
            raise
        raise CheckpointError(
            f"{destination}: {what}; {remedy} and run the same again, it goes on from the files "
            "that are finished"
        ) from error


def _write_companions(staging: Staging, source: Checkpoint, plan: Plan) -> list[str]:
    """Write all but the weights and the manifest; their names."""
    names = companions(source.folder, leave_out=[MANIFEST])
    for name in names:
        staging.write(name, read_companion(source.folder, name))
    staging.write(CONFIG, render_json(plan.config))
    staging.write(INDEX, render_json(plan.index))
    return [*names, CONFIG, INDEX]


def _check_settings(
    modules_to_not_convert: Sequence[str], workers: int | None, max_shard_bytes: int
) -> None:
    if isinstance(modules_to_not_convert, str):
        raise ConfigurationError(
            "modules_to_not_convert: is one string; give a list of module names"
        )
    if not all(name.strip() for name in modules_to_not_convert):
        raise ConfigurationError(
            "modules_to_not_convert: an empty name would exclude every module; remove it"
        )
    if workers is not None and workers < 1:
        raise ConfigurationError(f"workers: {workers} threads do nothing; give 1 or more")
    if max_shard_bytes < 1:
        raise ConfigurationError(f"max_shard_bytes: {max_shard_bytes} is no size; give 1 or more")


def _check_destination(source: Checkpoint, destination: Path, overwrite: bool) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(f"{destination}: is a file; name a folder")
    if destination.resolve() == source.folder:
        raise CheckpointError(f"{destination}: is the source itself; name another folder")
    if is_complete(destination):
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
    # What an interrupted run has written already is used again.
    written = sum(
        path.lstat().st_blocks * 512 for path in (destination / WORK).glob("*.safetensors")
    )
    free = shutil.disk_usage(folder).free
    if plan.nbytes - written > free:
        raise CheckpointError(
            f"{destination}: needs {(plan.nbytes - written) / 1e9:.2f} GB and {free / 1e9:.2f} GB "
            "are free; free some space or name a folder on another disk"
        )
