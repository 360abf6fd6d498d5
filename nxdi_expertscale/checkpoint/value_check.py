"""Check the values of a finished folder: range, scales, and the error against the source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from nxdi_expertscale.checkpoint.faults import Fault
from nxdi_expertscale.checkpoint.parallel import Meter, for_each
from nxdi_expertscale.checkpoint.quantization_error import MIN_SNR_DB, ErrorSums, LayerError
from nxdi_expertscale.checkpoint.read.chunks import Chunk, chunks_of
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.read.tensors import Weight
from nxdi_expertscale.checkpoint.read.values import TORCH_DTYPES, ValueReader
from nxdi_expertscale.display.progress import Progress
from nxdi_expertscale.errors import CheckpointError, parameter
from nxdi_expertscale.numerics import fp8


@dataclass(frozen=True)
class CheckedValues:
    """What was found in the values of a folder.

    Attributes:
        faults: What is wrong.
        warnings: What should be known.
        layers: The error of each layer, where there was a source to compare with.
    """

    faults: list[Fault]
    warnings: tuple[Fault, ...]
    layers: tuple[LayerError, ...] = ()


def check_values(model: Model, workers: int, progress: Progress | None) -> CheckedValues:
    """Check that every value is finite and within Neuron's range, and every scale positive.

    Args:
        model: The finished folder.
        workers: Threads.
        progress: Called with the bytes that are done, and all of them.
    """
    readable = [weight for weight in model.weights if weight.tensor.dtype in TORCH_DTYPES]
    meter = Meter(sum(weight.tensor.nbytes for weight in readable), progress)
    faults: dict[str, str] = {}
    below_floor: set[str] = set()
    with TensorReader(model.files) as reader:
        values = ValueReader(model.files, reader)

        def check(chunk: Chunk) -> None:
            fault = _find_fault(values, chunk)
            if fault is not None:
                faults[chunk.weight.name] = fault
            elif _is_below_floor(values, chunk):
                below_floor.add(chunk.weight.name)
            meter.add(chunk.nbytes)

        for_each(check, chunks_of(readable), workers)
    return CheckedValues(_sorted(faults), _floor_warnings(below_floor))


def _is_below_floor(values: ValueReader, chunk: Chunk) -> bool:
    weight, rows = chunk.weight, chunk.rows
    if weight.scale is None:
        return False
    scale = values.scale(weight.scale, rows, weight.tensor.columns)
    if not bool((scale == fp8.MIN_SCALE).any()):
        return False
    return fp8.has_rows_below_floor(values.stored(weight, rows).to(torch.float32), scale)


def _floor_warnings(names: Iterable[str]) -> tuple[Fault, ...]:
    what = (
        f"has channels of magnitudes below {fp8.MIN_SCALE * fp8.SMALLEST_NORMAL:.2g}, of which "
        f"FP8 with NxD's smallest scale ({fp8.MIN_SCALE:g}) keeps little; if they matter, keep the "
        f"module in full precision ({parameter('modules_to_not_convert')})"
    )
    return tuple(Fault(name, what) for name in sorted(names))


def _find_fault(values: ValueReader, chunk: Chunk) -> str | None:
    weight, rows = chunk.weight, chunk.rows
    stored = values.stored(weight, rows)
    try:
        if weight.scale is None:
            values.check_finite(weight.tensor, stored)
        elif fp8.exceeds_range(stored):
            return "has values beyond ±240, which Neuron reads as infinity or NaN"
        else:
            values.scale(weight.scale, rows, weight.tensor.columns)
    except CheckpointError as error:
        return str(error)
    return None


def compare_values(
    model: Model, source: Model, workers: int, progress: Progress | None
) -> CheckedValues:
    """Check the values of each tensor, and measure how far they are from the source's.

    Tensors that the source does not have, or has in another shape, are left out. A quantized
    tensor that is further off than E4M3 can be is a fault, and so is a layer.

    Args:
        model: The finished folder.
        source: What it was made from.
        workers: Threads.
        progress: Called with the bytes that are done, and all of them.
    """
    theirs = source.weights_by_name
    compared = [
        weight
        for weight in model.weights
        if weight.tensor.dtype in TORCH_DTYPES
        and weight.name in theirs
        and weight.tensor.shape == theirs[weight.name].tensor.shape
    ]
    meter = Meter(sum(weight.tensor.nbytes for weight in compared), progress)
    faults: dict[str, str] = {}
    below_floor: set[str] = set()
    sums = ErrorSums()
    with TensorReader(model.files) as our_reader, TensorReader(source.files) as their_reader:
        our_values = ValueReader(model.files, our_reader)
        their_values = ValueReader(source.files, their_reader)

        def compare(chunk: Chunk) -> None:
            weight, rows = chunk.weight, chunk.rows
            fault = _find_fault(our_values, chunk)
            if fault is None:
                reference = their_values.values(theirs[weight.name], rows)
                values = our_values.values(weight, rows)
                if weight.scale is not None:
                    sums.add(weight.name, reference, values)
                    if fp8.has_rows_too_small(reference):
                        below_floor.add(weight.name)
                elif not torch.equal(values, _rounded(reference, weight)):
                    fault = "is not quantized, and differs from the source"
            if fault is not None:
                faults[weight.name] = fault
            meter.add(chunk.nbytes)

        for_each(compare, chunks_of(compared), workers)
    layers = sums.by_layer()
    far = {
        name: f"is further from the source than FP8 rounds: {snr:.1f} dB, at least {MIN_SNR_DB:g}"
        for name, snr in sums.by_tensor().items()
        if snr < MIN_SNR_DB and name not in below_floor and name not in faults
    }
    far_layers = [
        Fault(
            f"layer {layer.layer}",
            f"is further from the source than FP8 rounds: {layer.snr_db:.1f} dB, at least "
            f"{MIN_SNR_DB:g}; its worst tensor is {layer.worst_tensor}",
        )
        for layer in layers
        if layer.snr_db is not None and layer.snr_db < MIN_SNR_DB and not below_floor
    ]
    return CheckedValues(
        [*_sorted(faults | far), *far_layers], _floor_warnings(below_floor), layers
    )


def _rounded(values: torch.Tensor, weight: Weight) -> torch.Tensor:
    return values.to(TORCH_DTYPES[weight.tensor.dtype]).to(torch.float32)


def _sorted(faults: Mapping[str, str]) -> list[Fault]:
    return [Fault(name, faults[name]) for name in sorted(faults)]
