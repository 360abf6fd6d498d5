"""Look at a checkpoint: what it is, and how far the scales of its experts lie apart."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nxdi_expertscale.checkpoint.chunks import row_ranges
from nxdi_expertscale.checkpoint.parallel import Meter, Progress, available_cores, for_each
from nxdi_expertscale.checkpoint.read.files import TensorReader
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.read.tensors import (
    Weight,
    check_architecture,
    read_weights,
    scheme_of,
)
from nxdi_expertscale.checkpoint.read.values import ValueReader
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, read_manifest
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
    """

    layer: int
    spread: float
    shared_scale_error: float
    experts: tuple[float, ...]


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        folder: Its folder.
        model_type: The model's type.
        family: The family that it belongs to.
        scheme: How its weights are quantized; None if they are not.
        made_by: The version of this package that made it; None if it is not one of ours.
        dtypes: Bytes of the tensors of each dtype.
        num_experts: Experts of a layer.
        layers: Each layer that has experts.
    """

    folder: Path
    model_type: str
    family: str
    scheme: str | None
    made_by: str | None
    dtypes: dict[str, int]
    num_experts: int
    layers: tuple[LayerSpread, ...]


def inspect_checkpoint(
    folder: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Read the experts of a checkpoint, quantized or not, and compare their scales.

    Args:
        folder: Any checkpoint that ``quantize`` reads, or has made.
        workers: Threads; by default as many as there are cores for this process.
        progress: Called with the bytes that are done, and all of them.

    Raises:
        CheckpointError: It is not a checkpoint of a supported model.
    """
    checkpoint, family = open_model(folder)
    weights = read_weights(checkpoint, family)
    check_architecture(checkpoint, family)
    experts = [weight for weight in weights if weight.expert is not None]
    meter = Meter(sum(weight.tensor.nbytes for weight in experts), progress)
    measured: dict[ExpertTensor, dict[int, tuple[torch.Tensor, torch.Tensor]]] = defaultdict(dict)
    with TensorReader(checkpoint) as reader:
        values = ValueReader(checkpoint, reader)

        def work(piece: tuple[Weight, ExpertTensor, range]) -> None:
            weight, place, rows = piece
            measured[place][rows.start] = _measure(values, weight, rows)
            meter.add(weight.tensor.nbytes * len(rows) // weight.tensor.shape[0])

        for_each(work, _pieces(experts), workers or available_cores())
    dtypes: dict[str, int] = defaultdict(int)
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    scheme = scheme_of(checkpoint)
    made_by_us = (checkpoint.folder / MANIFEST).is_file()
    count = family.experts_of(checkpoint.config)
    return Inspection(
        folder=checkpoint.folder,
        model_type=str(checkpoint.config["model_type"]),
        family=family.name,
        scheme=scheme.name if scheme is not None else None,
        made_by=read_manifest(checkpoint.folder).version if made_by_us else None,
        dtypes=dict(sorted(dtypes.items())),
        num_experts=count or 0,
        layers=tuple(_spreads(measured)),
    )


def _pieces(experts: list[Weight]) -> Iterator[tuple[Weight, ExpertTensor, range]]:
    for weight in experts:
        if weight.expert is not None and weight.expert.suffix == "weight":
            for rows in row_ranges(weight.tensor.shape):
                yield weight, weight.expert, rows


def _measure(reader: ValueReader, weight: Weight, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and energy (sum of squares) of each row, ``[rows]`` float32."""
    values = reader.values(weight, rows)
    scale = fp8.scale_per_channel(values).squeeze(-1)
    reader.expect_finite(weight.tensor, scale)
    return scale, values.square_().sum(dim=-1)


def _spreads(
    measured: Mapping[ExpertTensor, Mapping[int, tuple[torch.Tensor, torch.Tensor]]],
) -> Iterator[LayerSpread]:
    """Put the pieces of each layer together, ``[E, 1, channels]``, and compare its experts."""
    layers: dict[int, dict[str, dict[int, ExpertTensor]]] = defaultdict(lambda: defaultdict(dict))
    for place in measured:
        layers[place.layer][place.projection][place.expert] = place
    for layer, projections in sorted(layers.items()):
        columns: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for experts in projections.values():
            pieces = [measured[experts[expert]] for expert in sorted(experts)]
            for column, of_layer in enumerate(columns):
                rows = [torch.cat([piece[at][column] for at in sorted(piece)]) for piece in pieces]
                of_layer.append(torch.stack(rows).unsqueeze(1))
        scale, energy = (scales.fuse(column) for column in columns)
        yield LayerSpread(
            layer=layer,
            spread=scales.spread(scale).median,
            shared_scale_error=scales.error_of_average(scale, energy),
            experts=tuple(scales.relative_to_average(scale).tolist()),
        )
