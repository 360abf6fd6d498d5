"""Inspect a checkpoint: what it is, and how far the scales of its experts lie apart."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich import filesize

from nxdi_expertscale.checkpoint.parallel import Meter, available_cores, for_each
from nxdi_expertscale.checkpoint.read.chunks import Chunk, chunks_of
from nxdi_expertscale.checkpoint.read.model import Model, open_model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.read.values import ValueReader
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, manifest_of
from nxdi_expertscale.display.progress import Progress, showing
from nxdi_expertscale.display.results import Shown, Table, listed
from nxdi_expertscale.errors import counted
from nxdi_expertscale.families.tensor_names import ExpertTensor
from nxdi_expertscale.numerics import fp8, scales
from nxdi_expertscale.sources.locate import open_source


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


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """What a checkpoint is.

    Attributes:
        folder: Its folder, or its address.
        model_type: The model's type.
        family: The family that it belongs to.
        scheme: How its weights are quantized; None if they are not.
        made_by: The version of this package that made it; None if it is not one of ours.
        dtypes: Bytes of the tensors of each dtype.
        num_experts: Experts of a layer.
        layers: Each layer that has experts.
        below_floor: Experts' weights with channels so small that the floor of the scale, 1e-5,
            loses them.
    """

    folder: Path | str
    model_type: str
    family: str
    scheme: str | None
    made_by: str | None
    dtypes: dict[str, int]
    num_experts: int
    layers: tuple[LayerSpread, ...]
    below_floor: tuple[str, ...]

    def facts(self) -> Mapping[str, str]:
        """What it is, and of what."""
        dtypes = (f"{dtype} {filesize.decimal(size)}" for dtype, size in self.dtypes.items())
        facts = {
            "checkpoint": str(self.folder),
            "model": self.model_type,
            "weights": f"{self.scheme or 'full precision'} ({', '.join(dtypes)})",
        }
        if self.made_by is not None:
            facts["made by"] = f"nxdi-expertscale {self.made_by}"
        facts["experts"] = (
            f"{self.num_experts} in {'each of ' if len(self.layers) > 1 else ''}"
            f"{counted(len(self.layers), 'layer')}"
        )
        if self.below_floor:
            facts["too small for FP8"] = listed(self.below_floor)
        return facts

    def tables(self) -> Sequence[Table]:
        """How far the scales of each layer's experts lie apart."""
        return [
            Table(
                "Scales of the experts",
                ("layer", "largest over smallest", "error of one shared scale"),
                tuple(
                    (str(layer.layer), f"{layer.spread:.2f}", f"{layer.shared_scale_error:.1%}")
                    for layer in self.layers
                ),
            )
        ]


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


def inspect_checkpoint(
    folder: str | os.PathLike[str],
    *,
    workers: int | None = None,
    spool: Path | None = None,
    progress: Progress | bool = True,
) -> Inspection:
    """Read the experts of a checkpoint, quantized or not, and compare their scales.

    Args:
        folder: Any checkpoint that ``quantize`` reads, or has made.
        workers: Threads; by default as many as there are cores for this process.
        spool: Folder for what is read of a checkpoint that is not on this host.
        progress: Called with the bytes that are done, and all of them. By default a bar is shown
            in a terminal or a notebook; False shows none.

    Raises:
        CheckpointError: It is not a checkpoint of a supported model.

    Example:
        >>> [layer.spread for layer in inspect_checkpoint("Qwen3-30B-A3B").layers]
    """
    with (
        open_source(folder, spool=spool) as source,
        showing(progress, "reading") as report,
    ):
        model = open_model(source)
        measured, below_floor = _measure_experts(model, workers or available_cores(), report)
        made_by = manifest_of(source).version if source.has(MANIFEST) else None
    dtypes: dict[str, int] = defaultdict(int)
    for tensor in model.files.tensors.values():
        dtypes[tensor.dtype] += tensor.nbytes
    return Inspection(
        folder=source.path,
        model_type=model.config.model_type,
        family=model.family.name,
        scheme=model.scheme.name if model.scheme is not None else None,
        made_by=made_by,
        dtypes=dict(sorted(dtypes.items())),
        num_experts=model.config.num_experts,
        layers=tuple(_spreads(measured, model.family.projections)),
        below_floor=tuple(sorted(below_floor)),
    )


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
