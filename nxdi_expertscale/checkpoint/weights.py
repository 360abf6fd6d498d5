"""Weights of a checkpoint as numbers: each read, and dequantized, when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType

import torch

from nxdi_expertscale import fp8, scales
from nxdi_expertscale.checkpoint.pieces import as_rows
from nxdi_expertscale.checkpoint.source import Checkpoint, TensorReader
from nxdi_expertscale.checkpoint.tensors import Weight, check_architecture, read_weights
from nxdi_expertscale.checkpoint.values import ValueReader
from nxdi_expertscale.decoder import Weights
from nxdi_expertscale.families import MoEFamily

_PREFIX = "model."


class StoredWeights:
    """The weights of a checkpoint, in full precision or quantized, as float32.

    Called with a name without Hugging Face's ``model.``, it gives the weight. Nothing is kept:
    what is read twice is read from the disk twice. Files stay open until it is closed.

    Raises:
        CheckpointError: The checkpoint is malformed, or quantized in a way that cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, family: MoEFamily) -> None:
        check_architecture(checkpoint, family)
        self._weights: Mapping[str, Weight] = {
            weight.tensor.name.removeprefix(_PREFIX): weight
            for weight in read_weights(checkpoint, family)
        }
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

    def quantized(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A weight as it is stored and its scales, one for each channel; None if it has none.

        Returns:
            ``[out, in]`` and ``[1, out]``, ``torch.float32``.
        """
        weight = self._weights[name]
        if weight.scale is None:
            return None
        stored = self._reader.stored(weight, _all_rows(weight))
        return stored.clone(), self.channel_scale(name)

    def channel_scale(self, name: str) -> torch.Tensor:
        """The scales of a weight that has one for each channel, ``[1, out]``.

        Raises:
            ValueError: It has none, or one for each block.
        """
        weight = self._weights[name]
        if weight.scale is None or weight.scale.columns < weight.tensor.shape[1]:
            raise ValueError(f"{name} has no scale for each channel")
        return self._reader.scale(weight.scale, _all_rows(weight), weight.tensor.shape[1]).T

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


def with_averaged_scales(stored: StoredWeights, family: MoEFamily, experts: int) -> Weights:
    """What a checkpoint's weights become where a layer's experts share their mean scale.

    That is NxDI without expert-wise scales: the quantized numbers stay as they are, and the mean
    takes the place of the scale that they were quantized with.

    Args:
        stored: A checkpoint with one scale for each channel of each expert.
        family: Its family.
        experts: Number of experts in a layer.
    """

    @lru_cache(maxsize=len(family.projections))
    def shared(layer: int, projection: str) -> torch.Tensor:
        keys = [family.expert_key(layer, expert, projection) for expert in range(experts)]
        return scales.average(torch.stack([stored.channel_scale(key) for key in keys]))[0]

    def weight(name: str) -> torch.Tensor:
        place = family.parse_expert_key(name)
        quantized = stored.quantized(name) if place is not None else None
        if place is None or quantized is None:
            return stored(name)
        return fp8.dequantize(quantized[0], shared(place.layer, place.projection).T)

    return weight
