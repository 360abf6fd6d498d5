"""Measure how far the scales of a checkpoint's experts lie apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from nxdi_expertscale.checkpoint.parallel import Meter, for_each
from nxdi_expertscale.checkpoint.read.chunks import Chunk, chunks_of
from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.read.values import ValueReader
from nxdi_expertscale.display.progress import Progress
from nxdi_expertscale.families.tensor_names import ExpertTensor
from nxdi_expertscale.numerics import fp8, scales


@dataclass(frozen=True)
class LayerSpread:
    """How far the scales of a layer's experts lie apart.

    Attributes:
        layer: Its number.
        spread: The largest expert's scale over the smallest's, the median of all channels.
        shared_scale_error: Relative error of the experts' weights (Frobenius norm) if each is
            quantized with its own scale and all are read with the mean of the scales, as they
            are without expert-wise scales. Rounding is not in it.
        experts: For each expert, its scale over the mean of all, the median of all channels.
        projections: The same of the channels of each projection, by its name: where one's scales
            rise from expert to expert and another's fall, the median of all shows neither.
    """

    layer: int
    spread: float
    shared_scale_error: float
    experts: tuple[float, ...] = field(repr=False)
    projections: Mapping[str, tuple[float, ...]] = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a weight.

    Attributes:
        scale: The scale of each, ``[rows]``, ``torch.float32``.
        energy: The sum of the squares of each, ``[rows]``, ``torch.float32``.
        is_below_floor: Whether one is so small that quantizing would lose it.
    """

    scale: torch.Tensor
    energy: torch.Tensor
    is_below_floor: bool = False


def measure_spreads(
    model: Model, workers: int, progress: Progress | None
) -> tuple[tuple[LayerSpread, ...], tuple[str, ...]]:
    """Read the experts of a checkpoint and compare their scales.

    Args:
        model: The checkpoint.
        workers: Threads.
        progress: Called with the bytes that are done, and all of them.

    Returns:
        How far they lie apart in each layer, and the names of the experts' weights with channels
        so small that quantizing would lose them.
    """
    measured, below_floor = _measure_experts(model, workers, progress)
    return tuple(_spreads(measured, model.family.projections)), tuple(sorted(below_floor))


def _measure_experts(
    model: Model, workers: int, progress: Progress | None
) -> tuple[Mapping[ExpertTensor, Mapping[int, _Rows]], set[str]]:
    """Measure the chunks of each expert's weights, by their first row; which are too small."""
    experts = {
        weight.name: weight.expert
        for weight in model.weights
        if weight.expert is not None and weight.expert.suffix == "weight"
    }
    weights = [weight for weight in model.weights if weight.name in experts]
    meter = Meter(sum(weight.tensor.nbytes for weight in weights), progress)
    measured: dict[ExpertTensor, dict[int, _Rows]] = {place: {} for place in experts.values()}
    below_floor: set[str] = set()
    with TensorReader(model.files) as reader:
        values = ValueReader(model.files, reader)

        def measure(chunk: Chunk) -> None:
            rows = _measure(values, chunk)
            measured[experts[chunk.weight.name]][chunk.rows.start] = rows
            if rows.is_below_floor:
                below_floor.add(chunk.weight.name)
            meter.add(chunk.nbytes)

        for_each(measure, chunks_of(weights), workers)
    return measured, below_floor


def _measure(reader: ValueReader, chunk: Chunk) -> _Rows:
    values = reader.values(chunk.weight, chunk.rows)
    scale = fp8.scale_per_channel(values).squeeze(-1)
    reader.check_finite(chunk.weight.tensor, scale)
    # Few weights have so small a scale at all, and looking closer costs as much as the rest.
    too_small = bool((scale == fp8.MIN_SCALE).any()) and fp8.has_rows_too_small(values)
    return _Rows(scale, values.square_().sum(dim=-1), too_small)


def _spreads(
    measured: Mapping[ExpertTensor, Mapping[int, _Rows]], projections: Sequence[str]
) -> Iterator[LayerSpread]:
    """Put the chunks of each layer together, and compare its experts."""
    layers: dict[int, dict[str, dict[int, ExpertTensor]]] = defaultdict(lambda: defaultdict(dict))
    for place in measured:
        layers[place.layer][place.projection][place.expert] = place
    for layer, places in sorted(layers.items()):
        scale_of_each, energy_of_each = dict[str, torch.Tensor](), list[torch.Tensor]()
        for projection in projections:
            experts = places[projection]
            rows = [_joined(measured[experts[expert]]) for expert in sorted(experts)]
            scale_of_each[projection] = torch.stack([each.scale for each in rows]).unsqueeze(1)
            energy_of_each.append(torch.stack([each.energy for each in rows]).unsqueeze(1))
        # [E, 1, channels of all projections]
        scale, energy = scales.fuse([*scale_of_each.values()]), scales.fuse(energy_of_each)
        yield LayerSpread(
            layer=layer,
            spread=scales.spread(scale).median,
            shared_scale_error=scales.error_of_average(scale, energy),
            experts=tuple(scales.relative_to_average(scale).tolist()),
            projections={
                name: tuple(scales.relative_to_average(own).tolist())
                for name, own in scale_of_each.items()
            },
        )


def _joined(chunks: Mapping[int, _Rows]) -> _Rows:
    in_order = [chunks[start] for start in sorted(chunks)]
    return _Rows(
        torch.cat([rows.scale for rows in in_order]), torch.cat([rows.energy for rows in in_order])
    )
