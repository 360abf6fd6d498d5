"""Weights of a checkpoint as numbers: each read, and dequantized, when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType

import torch

from nxdi_expertscale.checkpoint.chunks import as_rows
from nxdi_expertscale.checkpoint.read.files import Checkpoint, TensorReader
from nxdi_expertscale.checkpoint.read.tensors import Weight, check_architecture, read_weights
from nxdi_expertscale.checkpoint.read.values import ValueReader
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.evaluation.decoder import Architecture, Weights
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.numerics import fp8, scales

_PREFIX = "model."
_MAKE_IT = "make the checkpoint with 'nxdi-expertscale quantize'"


class StoredWeights:
    """The weights of a checkpoint, in full precision or quantized, as float32.

    Called with a name without Hugging Face's ``model.``, it gives the weight. Nothing is kept:
    what is read twice is read from the disk twice. Files stay open until it is closed.

    Attributes:
        folder: The checkpoint's folder.

    Raises:
        CheckpointError: The checkpoint is malformed, or quantized in a way that cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, family: MoEFamily) -> None:
        check_architecture(checkpoint, family)
        self._weights: Mapping[str, Weight] = {
            weight.tensor.name.removeprefix(_PREFIX): weight
            for weight in read_weights(checkpoint, family)
        }
        self.folder = checkpoint.folder
        self._files = TensorReader(checkpoint)
        self._reader = ValueReader(checkpoint, self._files)

    @property
    def names(self) -> frozenset[str]:
        """Names of all weights."""
        return frozenset(self._weights)

    def __call__(self, name: str) -> torch.Tensor:
        """The values of a weight, ``torch.float32``."""
        weight = self._weights[name]
        values = self._reader.values(weight, _all_rows(weight))
        return values.clone().view(weight.tensor.shape)

    def is_quantized(self, name: str) -> bool:
        """Whether a weight has scales."""
        return self._weights[name].scale is not None

    def quantized(self, name: str) -> torch.Tensor:
        """A weight as it is stored, without its scales."""
        weight = self._weights[name]
        return self._reader.stored(weight, _all_rows(weight)).clone()

    def channel_scale(self, name: str) -> torch.Tensor:
        """The scales of a weight, one for each output channel, ``[1, out]``, ``torch.float32``.

        Raises:
            CheckpointError: It has none, or one for each block.
        """
        weight = self._weights[name]
        columns = weight.tensor.shape[-1]
        if weight.scale is None or weight.scale.columns < columns:
            raise CheckpointError(
                f"{self.folder / weight.tensor.file}: {weight.tensor.name}: does not have one "
                f"scale for each output channel; {_MAKE_IT}"
            )
        return self._reader.scale(weight.scale, _all_rows(weight), columns).T

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _all_rows(weight: Weight) -> range:
    return range(as_rows(weight.tensor.shape)[0])


def with_averaged_scales(stored: StoredWeights, model: Architecture) -> Weights:
    """What a checkpoint's weights become where a layer's experts share their mean scale.

    That is NxDI without expert-wise scales: the quantized numbers stay as they are, and the mean
    takes the place of the scale that they were quantized with.

    Args:
        stored: A checkpoint with one scale for each channel of each expert, in some layers.
        model: What the checkpoint holds.

    Raises:
        CheckpointError: No layer's experts have scales. The weights raise it too, where some
            experts of a layer have scales and others none.
    """
    family = model.family

    @lru_cache(maxsize=len(family.projections))
    def shared(layer: int, projection: str) -> torch.Tensor:
        keys = [family.expert_key(layer, expert, projection) for expert in range(model.experts)]
        return scales.average(torch.stack([stored.channel_scale(key) for key in keys]))[0]

    def weight(name: str) -> torch.Tensor:
        place = family.names.parse_expert_key(name)
        if place is None or not stored.is_quantized(name):
            return stored(name)
        return fp8.dequantize(stored.quantized(name), shared(place.layer, place.projection).T)

    if not any(
        family.names.parse_expert_key(name) and stored.is_quantized(name) for name in stored.names
    ):
        raise CheckpointError(f"{stored.folder}: has no quantized experts; {_MAKE_IT}")
    return weight
