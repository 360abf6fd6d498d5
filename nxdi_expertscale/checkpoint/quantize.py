"""Quantize a checkpoint: open, plan, write, publish."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich import filesize

from nxdi_expertscale.checkpoint.json_files import render_json
from nxdi_expertscale.checkpoint.model_card import find_base_model, read_card, render_card
from nxdi_expertscale.checkpoint.parallel import Meter, available_cores
from nxdi_expertscale.checkpoint.quantization_error import ErrorSums, LayerError
from nxdi_expertscale.checkpoint.read.auxiliary import find_auxiliary_files, read_auxiliary_file
from nxdi_expertscale.checkpoint.read.files import (
    CONFIG,
    INDEX,
)
from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.checkpoint.upstream_limits import warn_of_limits
from nxdi_expertscale.checkpoint.write.cluster import ClusterExecutor, check_address
from nxdi_expertscale.checkpoint.write.destination import (
    check_space,
    translate_disk_errors,
)
from nxdi_expertscale.checkpoint.write.executor import Executor, Run
from nxdi_expertscale.checkpoint.write.locate import open_destination, spool_for
from nxdi_expertscale.checkpoint.write.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    manifest_of,
    normalized,
)
from nxdi_expertscale.checkpoint.write.plan import MAX_SHARD_BYTES, Plan, check_readable, make_plan
from nxdi_expertscale.checkpoint.write.provenance import (
    check_unchanged,
    source_files,
    source_records,
)
from nxdi_expertscale.checkpoint.write.staging import CARD, ShardRecord, Staging, digests_of_tensors
from nxdi_expertscale.display.progress import Progress, showing
from nxdi_expertscale.display.results import Shown, listed
from nxdi_expertscale.errors import ConfigurationError, counted, parameter
from nxdi_expertscale.families.exclusions import parse_exclusions
from nxdi_expertscale.sources.locate import open_source
from nxdi_expertscale.version import __version__


@dataclass(frozen=True, repr=False)
class QuantizationResult(Shown):
    """What a run made.

    Attributes:
        destination: The finished folder, or its address in S3.
        source_bytes: Bytes of the source's files of weights.
        output_bytes: Bytes of the files of weights that were written.
        seconds: How long it took.
        tensors: How many tensors there are of each kind: ``quantized experts``,
            ``quantized linears``, ``dequantized`` and ``kept``.
        shards: Number of files of weights.
        resumed_shards: How many of them an earlier run had finished.
        modules_to_not_convert: Modules that were left in full precision.
        below_floor: Weights with channels so small that the floor of the scale, 1e-5, loses them.
        code_left_out: Scripts, binaries and ``auto_map`` of configs, which are not copied.
        mtp_left_out: Number of tensors that predict further tokens, and were left out.
    """

    destination: Path | str
    source_bytes: int
    output_bytes: int
    seconds: float
    tensors: Mapping[str, int]
    shards: int
    resumed_shards: int
    modules_to_not_convert: tuple[str, ...]
    below_floor: tuple[str, ...]
    code_left_out: tuple[str, ...]
    mtp_left_out: int

    def facts(self) -> Mapping[str, str]:
        """What was made, from what, and what is to be known of it."""
        facts = {
            "checkpoint": str(self.destination),
            "before": filesize.decimal(self.source_bytes),
            "after": f"{filesize.decimal(self.output_bytes)} in {counted(self.shards, 'file')}",
            "time": f"{self.seconds:.1f} s",
            **{kind: counted(number, "tensor") for kind, number in self.tensors.items()},
        }
        if self.modules_to_not_convert:
            facts["in full precision"] = listed(self.modules_to_not_convert)
        if self.mtp_left_out:
            facts["left out (MTP)"] = counted(self.mtp_left_out, "tensor")
        if self.resumed_shards:
            facts["from an earlier run"] = counted(self.resumed_shards, "file")
        if self.below_floor:
            facts["too small for FP8"] = listed(self.below_floor)
        return facts


def quantize_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    modules_to_not_convert: Sequence[str] = (),
    workers: int | None = None,
    overwrite: bool = False,
    keep_mtp: bool = False,
    spool: Path | None = None,
    ray: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | bool = True,
) -> QuantizationResult:
    """Make an FP8 checkpoint with one scale for each output channel of each expert.

    The output is what NxDI loads and what Hugging Face's tools understand (compressed-tensors):
    every quantized weight ``[out, in]`` is FP8 E4M3 within ±240 and has a ``weight_scale``
    ``[out, 1]``, float32. It does not depend on ``workers``. If the run is cut off, the folder
    cannot be loaded, and the same call goes on from the files that were finished.

    Args:
        src: A checkpoint: ``config.json`` and safetensors files in a folder, on the Hub or in S3;
            see :func:`~nxdi_expertscale.sources.locate.open_source`.
        dst: The folder to make, or ``s3://bucket/prefix``; new, empty, or one that an earlier call
            made or began. No two runs may write to one prefix at a time.
        modules_to_not_convert: Modules that stay in full precision, in the names of the checkpoint
            or of NxDI's modules; see :func:`~nxdi_expertscale.families.exclusions.Exclusions`.
            What NxDI cannot load quantized, such as the router, is never converted.
        workers: Threads; by default as many as there are cores for this process.
        overwrite: Replace a finished folder. The old one stays until the new one is complete.
        keep_mtp: Keep what predicts further tokens (multi-token prediction), in full precision.
            NxDI does not load it, and by default it is left out.
        spool: Folder for what is read of a source that is not on this host, up to 2.15 GB at a
            time, and for the files that are on their way to S3, up to four; by default on the
            disk of a destination that is a folder, and else in the user's cache.
        ray: Address of a Ray cluster (``HOST:PORT`` of its head, or ``auto``) whose nodes write the
            weights; this host has to be one of them. Each has to reach ``src`` and ``dst`` under
            the same names: a folder that they share, the Hub, S3. ``workers`` and ``spool`` are
            then those of each node.
        max_shard_bytes: Size of the files of weights.
        progress: Called with bytes of the source that are done, and all of them. By default a bar
            is shown in a terminal or a notebook; False shows none.

    Raises:
        CheckpointError: The source is malformed or not supported, the destination is taken, or
            there is too little space.
        ConfigurationError: A setting is not possible, or the cluster cannot be joined.

    Example:
        >>> quantize_checkpoint("Qwen3-30B-A3B", "Qwen3-30B-A3B-FP8").tensors
        {'quantized experts': 18432, 'quantized linears': 193, 'dequantized': 0, 'kept': 242}
    """
    started = time.perf_counter()
    check_settings(modules_to_not_convert, workers, max_shard_bytes)
    if ray is not None:
        check_address(ray)
    meanwhile = spool_for(dst, spool)
    destination = open_destination(dst, spool)

    with (
        open_source(src, spool=meanwhile) as opened,
        showing(progress, "quantizing") as report,
        ExitStack() as joined,
    ):
        # 1. Open the source: its config, the headers of its files, its weights and their scales.
        source = open_model(opened, keep_mtp=keep_mtp)
        warn_of_limits(source)

        # 2. Plan every file that will be written, and check that there is room for it.
        plan = make_plan(source, modules_to_not_convert, max_shard_bytes)
        check_readable(plan)
        auxiliary = find_auxiliary_files(source.folder, leave_out=[MANIFEST])
        original_card = read_card(source.folder)
        destination.check(source, overwrite=overwrite)
        check_space(plan.nbytes, destination)
        cluster: Executor | None = None
        if ray is not None:
            cluster = joined.enter_context(ClusterExecutor(ray, workers=workers, spool=spool))

        with translate_disk_errors(destination.path), destination.staging() as staging:
            # 3. Publish what an earlier run wrote completely; if that is what was asked for, it
            #    is all.
            finished = staging.resume_publishing() and _find_result(
                destination.path, source, modules_to_not_convert
            )
            if finished:
                resumed, below_floor = len(plan.shards), finished.below_floor
            else:
                destination.check(source, overwrite=overwrite)

                # 4. Read, convert and write the weights, shard by shard. From here on torch is
                #    needed.
                from nxdi_expertscale.checkpoint.write.convert import SAMPLED
                from nxdi_expertscale.checkpoint.write.stream import LocalExecutor, write_shards

                source_before = source_files(source)
                threads = workers or available_cores()
                meter = Meter(plan.source_bytes, report)
                records, resumed = write_shards(
                    Run(source, source_before, destination, staging, meter),
                    plan.shards,
                    cluster or LocalExecutor(threads),
                    workers=threads,
                )

                below_floor = tuple(sorted(n for r in records.values() for n in r.below_floor))

                # 5. Write the config, the index, and the files that lie beside the weights.
                files = _write_other_files(staging, source, plan, auxiliary.names)

                # 6. Check that the source is still what was read, and record what was made from it.
                digests = digests_of_tensors(records.values())
                check_unchanged(source, source_before, digests)
                manifest = Manifest(
                    version=__version__,
                    model_type=source.config.model_type,
                    modules_to_not_convert=normalized(
                        (*modules_to_not_convert, *plan.kept_by_source)
                    ),
                    source=source_records(source, source_before, digests),
                    tensors=plan.count_kinds(),
                    below_floor=below_floor,
                    shards=tuple(records[shard.name].file for shard in plan.shards),
                    files=files,
                    origin=opened.origin,
                )

                # 7. Write the model card, with the error of what was rounded on the way.
                staging.write(
                    CARD,
                    render_card(
                        manifest,
                        find_base_model(source.folder),
                        num_experts=source.config.num_experts,
                        has_full_head="lm_head.weight_scale" not in plan.index["weight_map"],
                        original=original_card,
                        errors=_layer_errors(records.values()),
                        how_measured=f"Of one row in {SAMPLED}, measured while they were rounded.",
                    ).encode(),
                )
                staging.write(MANIFEST, manifest.to_json())

                # 8. Publish: move the files to their places, the index after all that it names.
                staging.publish()

    return QuantizationResult(
        destination=destination.path,
        source_bytes=source.files.nbytes,
        output_bytes=plan.nbytes,
        seconds=time.perf_counter() - started,
        tensors=plan.count_kinds(),
        shards=len(plan.shards),
        resumed_shards=resumed,
        modules_to_not_convert=plan.exclusions,
        below_floor=below_floor,
        code_left_out=auxiliary.code,
        mtp_left_out=source.mtp_left_out,
    )


def _find_result(
    destination: Path | str, source: Model, modules_to_not_convert: Sequence[str]
) -> Manifest | None:
    """The manifest of a finished folder, if it is what this run is to make."""
    from nxdi_expertscale.checkpoint.origin import mismatch_of

    with open_source(destination) as folder:
        finished, manifest = open_model(folder), manifest_of(folder)
        reason = mismatch_of(finished, manifest, source, modules_to_not_convert)
    return manifest if reason is None else None


def _layer_errors(records: Iterable[ShardRecord]) -> tuple[LayerError, ...]:
    """The error of each layer, of what was rounded."""
    sums = ErrorSums()
    for record in records:
        for name, (signal, noise) in record.energies.items():
            sums.add_energies(name, signal, noise)
    return sums.by_layer()


def _write_other_files(
    staging: Staging, source: Model, plan: Plan, auxiliary: Sequence[str]
) -> tuple[FileRecord, ...]:
    """Write all files but those of weights and the manifest."""
    for name in auxiliary:
        staging.write(name, read_auxiliary_file(source.folder, name))
    staging.write(CONFIG, render_json(plan.config))
    staging.write(INDEX, render_json(plan.index))
    return tuple(staging.file_record(name) for name in (*auxiliary, CONFIG, INDEX))


def check_settings(
    modules_to_not_convert: Sequence[str], workers: int | None, max_shard_bytes: int
) -> None:
    """Check settings that hold for any source.

    Raises:
        ConfigurationError: One is not possible.
    """
    parse_exclusions(modules_to_not_convert)
    if workers is not None and workers < 1:
        raise ConfigurationError(
            f"{parameter('workers')}: {workers} threads do nothing; give 1 or more"
        )
    if max_shard_bytes < 1:
        raise ConfigurationError(f"max_shard_bytes: {max_shard_bytes} is no size; give 1 or more")
