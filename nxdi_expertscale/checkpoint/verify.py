"""Verify a finished folder: files, names, shapes, range, scales, and the error of each layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nxdi_expertscale.checkpoint.digests import digest_source_file
from nxdi_expertscale.checkpoint.faults import Fault
from nxdi_expertscale.checkpoint.finished import find_changed_files
from nxdi_expertscale.checkpoint.manifest_check import find_manifest_faults
from nxdi_expertscale.checkpoint.parallel import available_cores
from nxdi_expertscale.checkpoint.quantization_error import LayerError, decibels
from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.checkpoint.write.manifest import (
    MANIFEST,
    Manifest,
    check_is_folder,
    manifest_of,
)
from nxdi_expertscale.checkpoint.write.plan import effective_exclusions
from nxdi_expertscale.checkpoint.write.stray_weights import find_stray_weights
from nxdi_expertscale.display.progress import Progress, showing
from nxdi_expertscale.display.results import Shown, Table
from nxdi_expertscale.errors import CheckpointError, counted
from nxdi_expertscale.families.exclusions import Exclusions
from nxdi_expertscale.sources.locate import is_remote, open_source
from nxdi_expertscale.sources.source import Source


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """The result of a verification.

    Attributes:
        folder: The folder that was verified, or its address.
        faults: Everything that is wrong; none if it is good.
        files: Number of files that were checked.
        quantized: Number of quantized weights that were checked.
        layers: The error of each layer, if there was a source to compare with.
        warnings: What is as ``quantize`` makes it, and should be known.
    """

    folder: Path | str
    faults: tuple[Fault, ...]
    files: int
    quantized: int
    layers: tuple[LayerError, ...]
    warnings: tuple[Fault, ...]

    def facts(self) -> Mapping[str, str]:
        """Whether it is good, and how much was checked."""
        facts = {
            "checkpoint": str(self.folder),
            "verdict": counted(len(self.faults), "fault") if self.faults else "good",
            "checked": f"{counted(self.files, 'file')}, "
            f"{counted(self.quantized, 'quantized weight')}",
        }
        if self.faults:
            facts["first fault"] = f"{self.faults[0].where}: {self.faults[0].what}"
        if self.warnings:
            facts["warnings"] = str(len(self.warnings))
        return facts

    def tables(self) -> Sequence[Table]:
        """What is wrong, what should be known, and the error of each layer."""
        of_faults = (
            Table(title, ("where", "what"), tuple((f.where, f.what) for f in found), frozenset({1}))
            for title, found in (("Faults", self.faults), ("Warnings", self.warnings))
            if found
        )
        return (*of_faults, *([self.error_table()] if self.layers else []))

    def error_table(self) -> Table:
        """The error of each layer."""
        return Table(
            "Error against the source",
            ("layer", "signal to noise", "worst tensor", "its own"),
            tuple(
                (
                    layer.layer,
                    decibels(layer.snr_db),
                    layer.worst_tensor,
                    decibels(layer.worst_snr_db),
                )
                for layer in self.layers
            ),
            names=frozenset({2}),
        )


def verify_checkpoint(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    spool: Path | None = None,
    progress: Progress | bool = True,
) -> Verification:
    """Check a folder that ``quantize`` finished.

    Args:
        folder: The folder, or an address; see :func:`~nxdi_expertscale.sources.locate.open_source`.
        against: The checkpoint that it was made from, to compare every value with.
        workers: Threads; by default as many as there are cores for this process.
        spool: Folder for what is read of a checkpoint that is not on this host.
        progress: Called with the bytes that are done, and all of them. By default a bar is shown
            in a terminal or a notebook; False shows none.

    Returns:
        Everything that is wrong with the folder, and with a source the error of each layer.

    Raises:
        CheckpointError: The folder was not made by ``quantize``, or ``against`` is not a
            checkpoint that can be read. What is wrong in the folder itself is a fault.

    Example:
        >>> verify_checkpoint("Qwen3-30B-A3B-FP8", "Qwen3-30B-A3B").faults
        ()
    """
    if not is_remote(folder):
        check_is_folder(folder)
    with ExitStack() as opened:
        place = opened.enter_context(open_source(folder, spool=spool))
        source = None
        if against is not None:
            source = opened.enter_context(open_source(against, spool=spool))
        report = opened.enter_context(showing(progress, "verifying"))
        return _verify(place, source, workers or available_cores(), report)


def _verify(
    folder: Source, against: Source | None, workers: int, progress: Progress | None
) -> Verification:
    manifest = manifest_of(folder)
    records = (*manifest.shards, *manifest.files)
    faults = _check_files(folder, manifest, workers)
    try:
        model = open_model(folder)
    except CheckpointError as error:
        faults.append(Fault(str(folder.path), str(error)))
        return Verification(folder.path, tuple(faults), len(records), 0, (), ())
    source = None if against is None else open_model(against, keep_mtp=model.has_mtp)
    faults += [Fault(MANIFEST, what) for what in find_manifest_faults(manifest, model)]
    faults += _check_treatments(model, manifest.modules_to_not_convert)
    # Torch is imported for the values; what is wrong with the folder is told before.
    from nxdi_expertscale.checkpoint.value_check import check_values, compare_values

    if source is None:
        found = check_values(model, workers, progress)
    else:
        faults += _check_source(manifest, model, source)
        found = compare_values(model, source, workers, progress)
    quantized = sum(weight.scale is not None for weight in model.weights)
    return Verification(
        folder=folder.path,
        faults=(*faults, *found.faults),
        files=len(records),
        quantized=quantized,
        layers=found.layers,
        warnings=found.warnings,
    )


def _check_files(folder: Source, manifest: Manifest, workers: int) -> list[Fault]:
    """Check that files have the content that was written, and that nothing is loaded instead."""
    records = (*manifest.shards, *manifest.files)
    changed = find_changed_files(folder, records, partial(digest_source_file, folder), workers)
    stray = find_stray_weights(folder.names(), manifest)
    return [
        *(Fault(name, what) for name, what in changed.items()),
        *(Fault(name, "is no part of the checkpoint, and may be loaded instead") for name in stray),
    ]


def _check_treatments(model: Model, modules_to_not_convert: Iterable[str]) -> list[Fault]:
    """Check that what has to be quantized is, with the right scale, and nothing else."""
    family = model.family
    exclusions = Exclusions(effective_exclusions(model, modules_to_not_convert), family)
    faults = []
    for weight in model.weights:
        if not weight.is_linear:
            continue
        name, scale = weight.name, weight.scale
        kept = not weight.can_be_quantized or exclusions.leave_out(weight.module)
        if kept and scale is not None:
            faults.append(Fault(name, "is quantized, and must be left as it is"))
        elif not kept and scale is None:
            faults.append(Fault(name, f"is {weight.tensor.dtype}, and must be quantized"))
        elif scale is not None and (
            scale.tensor.dtype != "F32" or scale.tensor.shape != (weight.tensor.rows, 1)
        ):
            faults.append(
                Fault(
                    scale.tensor.name,
                    f"is {scale.tensor.dtype} {list(scale.tensor.shape)}, and must be F32 "
                    f"{[weight.tensor.rows, 1]}",
                )
            )
    return faults


def _check_source(manifest: Manifest, model: Model, source: Model) -> list[Fault]:
    """Check that a folder was made from a source, and has its tensors."""
    from nxdi_expertscale.checkpoint.origin import mismatch_of

    faults = []
    difference = mismatch_of(model, manifest, source, manifest.modules_to_not_convert)
    if difference is not None:
        faults.append(Fault(str(source.folder.path), difference))
    ours, theirs = model.weights_by_name, source.weights_by_name
    for name in sorted(set(ours) ^ set(theirs)):
        faults.append(Fault(name, "is missing" if name in theirs else "is not in the source"))
    for name in sorted(set(ours) & set(theirs)):
        if ours[name].tensor.shape != theirs[name].tensor.shape:
            faults.append(Fault(name, "has another shape in the source"))
    return faults
