"""Weights of a checkpoint as numbers: each read, and dequantized, when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch

from nxdi_expertscale.checkpoint.read.model import Model
from nxdi_expertscale.checkpoint.read.tensor_reader import TensorReader
from nxdi_expertscale.checkpoint.read.tensors import Weight
from nxdi_expertscale.checkpoint.read.values import ValueReader
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.evaluation.decoder import Weights
from nxdi_expertscale.numerics import fp8, scales
from nxdi_expertscale.sources.closing import Closing

_PREFIX = "model."
_MAKE_IT = "make the checkpoint with 'nxdi-expertscale quantize'"


class StoredWeights(Closing):
    """The weights of a checkpoint, in full precision or quantized, as float32.

    Called with a name without Hugging Face's ``model.``, it gives the weight. Nothing is kept:
    what is asked for twice is read twice. Files stay open until it is closed.

    Attributes:
        model: The checkpoint.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._weights: Mapping[str, Weight] = {
            weight.name.removeprefix(_PREFIX): weight for weight in model.weights
        }
        self._files = TensorReader(model.files)
        self._reader = ValueReader(model.files, self._files)

    @property
    def names(self) -> frozenset[str]:
        """Names of all weights."""
        return frozenset(self._weights)

    def __call__(self, name: str) -> torch.Tensor:
        """The values of a weight, ``torch.float32``."""
        weight = self._weights[name]
        values = self._reader.values(weight, range(weight.tensor.rows))
        return values.clone().view(weight.tensor.shape)

    def has_scale(self, name: str) -> bool:
        """Whether a weight is stored quantized, with a scale."""
        return self._weights[name].scale is not None

    def without_scale(self, name: str) -> torch.Tensor:
        """A quantized weight as it is stored, ``[out, in]``, ``torch.float8_e4m3fn``."""
        weight = self._weights[name]
        return self._reader.stored(weight, range(weight.tensor.rows)).clone()

    def channel_scale(self, name: str) -> torch.Tensor:
        """The scales of a weight, one for each output channel, ``[1, out]``, ``torch.float32``.

        Raises:
            CheckpointError: It has none, or one for each block.
        """
        weight = self._weights[name]
        columns = weight.tensor.columns
        if weight.scale is None or weight.scale.columns < columns:
            raise CheckpointError(
                f"{self.model.files.location(weight.tensor)}: does not have one scale for each "
                f"output channel; {_MAKE_IT}"
            )
        return self._reader.scale(weight.scale, range(weight.tensor.rows), columns).T

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def with_averaged_scales(stored: StoredWeights) -> Weights:
    """What a checkpoint's weights become where a layer's experts share their mean scale.

    That is NxDI without expert-wise scales: the quantized numbers stay as they are, and the mean
    takes the place of the scale that they were quantized with.

    Args:
        stored: A checkpoint with one scale for each channel of each expert, in some layers.

    Raises:
        CheckpointError: No layer's experts have scales. The weights raise it too, where some
            experts of a layer have scales and others none.
    """
    family, config = stored.model.family, stored.model.config

    @lru_cache(maxsize=len(family.projections))
    def shared(layer: int, projection: str) -> torch.Tensor:
        """The mean of a projection's scales over the experts, ``[1, out]``."""
        experts = range(config.num_experts)
        keys = [family.expert_key(layer, expert, projection) for expert in experts]
        return scales.average(torch.stack([stored.channel_scale(key) for key in keys]))[0]

    def weight(name: str) -> torch.Tensor:
        place = family.names.parse_expert_key(name)
        if place is None or not stored.has_scale(name):
            return stored(name)
        return fp8.dequantize(stored.without_scale(name), shared(place.layer, place.projection).T)

    if not any(
        family.names.parse_expert_key(name) and stored.has_scale(name) for name in stored.names
    ):
        raise CheckpointError(f"{stored.model.folder.path}: has no quantized experts; {_MAKE_IT}")
    return weight
