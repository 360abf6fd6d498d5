"""Inspect a checkpoint: what it is, and how far the scales of its experts lie apart."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import filesize

from nxdi_expertscale.checkpoint.parallel import available_cores
from nxdi_expertscale.checkpoint.read.model import open_model
from nxdi_expertscale.checkpoint.write.manifest import MANIFEST, manifest_of
from nxdi_expertscale.display.progress import Progress, showing
from nxdi_expertscale.display.results import Shown, Table, listed
from nxdi_expertscale.errors import counted
from nxdi_expertscale.sources.locate import open_source

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint.expert_spread import LayerSpread


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
        # Torch is imported for the values; what is wrong with the folder is told before.
        from nxdi_expertscale.checkpoint.expert_spread import measure_spreads

        layers, below_floor = measure_spreads(model, workers or available_cores(), report)
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
        layers=layers,
        below_floor=below_floor,
    )
