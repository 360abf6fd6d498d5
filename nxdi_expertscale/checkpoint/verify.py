"""Verify a finished folder: files, names, shapes, range, scales, and the error of each layer."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nxdi_expertscale.checkpoint.chunks import as_rows, row_ranges
from nxdi_expertscale.checkpoint.parallel import Meter, Progress, available_cores, for_each
from nxdi_expertscale.checkpoint.read.files import Checkpoint, TensorReader, checked_file
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.read.tensors import Weight, check_architecture, read_weights
from nxdi_expertscale.checkpoint.read.values import TORCH_DTYPES, ValueReader
from nxdi_expertscale.checkpoint.write.manifest import (
    FileRecord,
    Manifest,
    file_record,
    read_manifest,
)
from nxdi_expertscale.checkpoint.write.plan import effective_exclusions
from nxdi_expertscale.checkpoint.write.provenance import mismatch_of
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.exclusions import is_excluded
from nxdi_expertscale.numerics import fp8

OUTSIDE_LAYERS = "head"
"""What stands for a layer where a tensor belongs to none."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class Fault:
    """Something that is wrong: the file or tensor, and what it is."""

    where: str
    what: str


@dataclass(frozen=True)
class LayerError:
    """How far a layer's quantized weights are from the source's.

    Attributes:
        layer: Its number, or :data:`OUTSIDE_LAYERS`.
        snr_db: Signal to noise over all its quantized weights, in dB; None if they are equal.
        worst_tensor: The weight with the least.
        worst_snr_db: Its signal to noise, in dB; None if it is equal.
    """

    layer: str
    snr_db: float | None
    worst_tensor: str
    worst_snr_db: float | None


@dataclass(frozen=True)
class Verification:
    """What was found in a folder.

    Attributes:
        folder: It.
        faults: Everything that is wrong; none if it is good.
        files: Number of files that were checked.
        quantized: Number of quantized weights that were checked.
        layers: The error of each layer, if there was a source to compare with.
    """

    folder: Path
    faults: tuple[Fault, ...]
    files: int
    quantized: int
    layers: tuple[LayerError, ...]


def verify_checkpoint(
    folder: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Check a folder that ``quantize`` finished.

    Args:
        folder: The folder.
        against: The checkpoint that it was made from, to compare every value with.
        workers: Threads; by default as many as there are cores for this process.
        progress: Called with the bytes that are done, and all of them.

    Raises:
        CheckpointError: The folder was not made by ``quantize``, or ``against`` is not a
            checkpoint that can be read. What is wrong in the folder itself is a fault.
    """
    path = Path(folder).absolute()
    manifest = read_manifest(path)
    source = None if against is None else open_model(against)[0]
    cores = workers or available_cores()
    records = (*manifest.shards, *manifest.files)
    faults = _check_files(path.resolve(), records, cores)
    layers: tuple[LayerError, ...] = ()
    try:
        checkpoint, family = open_model(path)
        weights = read_weights(checkpoint, family)
        check_architecture(checkpoint, family)
    except CheckpointError as error:
        return Verification(path, (*faults, Fault(str(path), str(error))), len(records), 0, ())
    exclusions = effective_exclusions(checkpoint.config, family, manifest.modules_to_not_convert)
    faults += _check_treatments(weights, family, exclusions)
    quantized = sum(weight.scale is not None for weight in weights)
    if source is None:
        faults += _check_values(checkpoint, weights, cores, progress)
    else:
        theirs = {weight.tensor.name: weight for weight in read_weights(source, family)}
        faults += _check_source(manifest, source, weights, theirs)
        pairs = [
            (weight, theirs[weight.tensor.name])
            for weight in weights
            if weight.tensor.name in theirs
            and weight.tensor.shape == theirs[weight.tensor.name].tensor.shape
        ]
        found, layers = _compare(checkpoint, source, pairs, cores, progress)
        faults += found
    return Verification(path, tuple(faults), len(records), quantized, layers)


def _check_files(folder: Path, records: Iterable[FileRecord], workers: int) -> list[Fault]:
    faults: dict[str, str] = {}

    def check(record: FileRecord) -> None:
        try:
            path = checked_file(folder, record.name)
        except CheckpointError as error:
            faults[record.name] = str(error)
            return
        size = path.stat().st_size
        if size != record.size:
            faults[record.name] = f"has {size} bytes, and {record.size} were written"
        elif file_record(path).blake3 != record.blake3:
            faults[record.name] = "has other content than was written (its checksum differs)"

    for_each(check, iter(records), workers)
    return [Fault(name, faults[name]) for name in sorted(faults)]


def _check_treatments(
    weights: Iterable[Weight], family: MoEFamily, exclusions: tuple[str, ...]
) -> list[Fault]:
    faults = []
    for weight in weights:
        if not weight.is_linear:
            continue
        name, scale = weight.tensor.name, weight.scale
        kept = family.names.is_router_key(name) or is_excluded(weight.module, exclusions, family)
        if kept and scale is not None:
            faults.append(Fault(name, "is quantized, and must be left as it is"))
        elif not kept and scale is None:
            faults.append(Fault(name, f"is {weight.tensor.dtype}, and must be quantized"))
        elif scale is not None and (
            scale.tensor.dtype != "F32" or scale.tensor.shape != (weight.tensor.shape[0], 1)
        ):
            faults.append(
                Fault(
                    scale.tensor.name,
                    f"is {scale.tensor.dtype} {list(scale.tensor.shape)}, and must be F32 "
                    f"{[weight.tensor.shape[0], 1]}",
                )
            )
    return faults


def _check_source(
    manifest: Manifest,
    source: Checkpoint,
    weights: Iterable[Weight],
    theirs: Mapping[str, Weight],
) -> list[Fault]:
    faults = []
    difference = mismatch_of(manifest, source, manifest.modules_to_not_convert)
    if difference is not None:
        faults.append(Fault(str(source.folder), difference))
    ours = {weight.tensor.name: weight for weight in weights}
    for name in sorted(set(ours) ^ set(theirs)):
        faults.append(Fault(name, "is missing" if name in theirs else "is not in the source"))
    for name in sorted(set(ours) & set(theirs)):
        if ours[name].tensor.shape != theirs[name].tensor.shape:
            faults.append(Fault(name, "has another shape in the source"))
    return faults


def _check_values(
    checkpoint: Checkpoint, weights: list[Weight], workers: int, progress: Progress | None
) -> list[Fault]:
    readable = [weight for weight in weights if weight.tensor.dtype in TORCH_DTYPES]
    meter = Meter(sum(weight.tensor.nbytes for weight in readable), progress)
    faults: dict[str, str] = {}
    with TensorReader(checkpoint) as reader:
        values = ValueReader(checkpoint, reader)

        def check(piece: tuple[Weight, range]) -> None:
            weight, rows = piece
            fault = _fault_of(values, weight, rows)
            if fault is not None:
                faults[weight.tensor.name] = fault
            meter.add(_nbytes(weight, rows))

        for_each(check, _pieces(readable), workers)
    return [Fault(name, faults[name]) for name in sorted(faults)]


def _fault_of(values: ValueReader, weight: Weight, rows: range) -> str | None:
    stored = values.stored(weight, rows)
    try:
        if weight.scale is None:
            values.expect_finite(weight.tensor, stored)
        elif fp8.exceeds_range(stored):
            return "has values beyond ±240, which Neuron reads as infinity or NaN"
        else:
            values.scale(weight.scale, rows, weight.tensor.shape[1])
    except CheckpointError as error:
        return str(error)
    return None


def _compare(
    ours: Checkpoint,
    source: Checkpoint,
    pairs: list[tuple[Weight, Weight]],
    workers: int,
    progress: Progress | None,
) -> tuple[list[Fault], tuple[LayerError, ...]]:
    """Check the values of each tensor, and measure how far they are from the source's."""
    readable = [pair for pair in pairs if pair[0].tensor.dtype in TORCH_DTYPES]
    partner = {our.tensor.name: their for our, their in readable}
    meter = Meter(sum(our.tensor.nbytes for our, _ in readable), progress)
    faults: dict[str, str] = {}
    signal: dict[str, list[float]] = defaultdict(list)
    noise: dict[str, list[float]] = defaultdict(list)
    with TensorReader(ours) as our_reader, TensorReader(source) as their_reader:
        our_values = ValueReader(ours, our_reader)
        their_values = ValueReader(source, their_reader)

        def compare(piece: tuple[Weight, range]) -> None:
            weight, rows = piece
            name = weight.tensor.name
            fault = _fault_of(our_values, weight, rows)
            if fault is None:
                reference = their_values.values(partner[name], rows)
                values = our_values.values(weight, rows)
                if weight.scale is not None:
                    signal[name].append(_energy(reference))
                    noise[name].append(_energy(values.sub_(reference)))
                elif not torch.equal(values, _rounded(reference, weight)):
                    fault = "is not quantized, and differs from the source"
            if fault is not None:
                faults[name] = fault
            meter.add(_nbytes(weight, rows))

        for_each(compare, _pieces([our for our, _ in readable]), workers)
    layers = _layer_errors(
        {name: math.fsum(parts) for name, parts in signal.items()},
        {name: math.fsum(parts) for name, parts in noise.items()},
    )
    return [Fault(name, faults[name]) for name in sorted(faults)], layers


def _rounded(values: torch.Tensor, weight: Weight) -> torch.Tensor:
    return values.to(TORCH_DTYPES[weight.tensor.dtype]).to(torch.float32)


def _energy(values: torch.Tensor) -> float:
    flat = values.view(-1)
    return float(torch.dot(flat, flat))


def _layer_errors(
    signal: Mapping[str, float], noise: Mapping[str, float]
) -> tuple[LayerError, ...]:
    layers: dict[str, list[str]] = defaultdict(list)
    for name in sorted(signal):
        match = _LAYER.search(name)
        layers[match[1] if match else OUTSIDE_LAYERS].append(name)
    errors = []
    for layer in sorted(layers, key=lambda layer: (not layer.isdigit(), layer.zfill(9))):
        names = layers[layer]
        snrs = {name: _snr(signal[name], noise[name]) for name in names}
        worst = min(names, key=snrs.__getitem__)
        snr = _snr(math.fsum(signal[n] for n in names), math.fsum(noise[n] for n in names))
        errors.append(LayerError(layer, _finite(snr), worst, _finite(snrs[worst])))
    return tuple(errors)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _snr(signal: float, noise: float) -> float:
    """Signal to noise in dB; infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise)


def _pieces(weights: Iterable[Weight]) -> Iterator[tuple[Weight, range]]:
    for weight in weights:
        for rows in row_ranges(weight.tensor.shape):
            yield weight, rows


def _nbytes(weight: Weight, rows: range) -> int:
    return weight.tensor.nbytes * len(rows) // as_rows(weight.tensor.shape)[0]
