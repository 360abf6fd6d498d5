"""Weights of a checkpoint as numbers: each read, and dequantized, when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType

import torch

from nxdi_expertscale import fp8, scales
from nxdi_expertscale.checkpoint.plan import PlannedTensor, make_plan
from nxdi_expertscale.checkpoint.quantize import MAX_SHARD_BYTES, TORCH_DTYPES
from nxdi_expertscale.checkpoint.source import Checkpoint, TensorReader
from nxdi_expertscale.checkpoint.tensor_file import StoredTensor
from nxdi_expertscale.decoder import Architecture, Weights
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families import MoEFamily

_MAKE_IT = "make the checkpoint with 'nxdi-expertscale quantize'"
_PREFIX = "model."


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
        plan = make_plan(checkpoint, family, (), MAX_SHARD_BYTES)
        self._tensors: Mapping[str, PlannedTensor] = {
            tensor.source.name.removeprefix(_PREFIX): tensor for tensor in plan.tensors
        }
        self._reader = TensorReader(checkpoint)
        self.folder = checkpoint.folder

    @property
    def names(self) -> frozenset[str]:
        """Names of all weights."""
        return frozenset(self._tensors)

    def __call__(self, name: str) -> torch.Tensor:
        """The values of a weight, ``torch.float32``."""
        tensor = self._tensors[name]
        values = self._read(tensor.source).to(torch.float32)
        if tensor.scale is None or tensor.block is None:
            return values
        rows, columns = tensor.block
        scale = self._read(tensor.scale).to(torch.float32)
        scale = scale.reshape(-(-values.shape[0] // rows), -(-values.shape[1] // columns))
        each_row = scale.repeat_interleave(rows, dim=0)[: values.shape[0]]
        return fp8.scale_blocks_(values, each_row, columns)

    def quantized(self, name: str) -> torch.Tensor:
        """A weight as it is stored, without its scales."""
        return self._read(self._tensors[name].source)

    def channel_scale(self, name: str) -> torch.Tensor:
        """The scales of a weight, one for each output channel, ``[1, out]``, ``torch.float32``.

        Raises:
            CheckpointError: It has none, or others.
        """
        tensor = self._tensors[name]
        where = f"{self.folder / tensor.source.file}: {tensor.source.name}"
        if tensor.scale is None:
            raise CheckpointError(f"{where}: is not quantized; {_MAKE_IT}")
        try:
            return scales.channel_scale(self._read(tensor.scale), tensor.source.shape[0])
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}; {_MAKE_IT}") from error

    def is_quantized(self, name: str) -> bool:
        """Whether a weight has scales."""
        return self._tensors[name].scale is not None

    def _read(self, tensor: StoredTensor) -> torch.Tensor:
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self._reader.read_into(raw.numpy().data, tensor.file, tensor.offset)
        return raw.view(TORCH_DTYPES[tensor.dtype]).view(tensor.shape)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def __enter__(self) -> StoredWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


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
        place = family.parse_expert_key(name)
        if place is None or not stored.is_quantized(name):
            return stored(name)
        return fp8.dequantize(stored.quantized(name), shared(place.layer, place.projection).T)

    if not any(
        family.parse_expert_key(name) and stored.is_quantized(name) for name in stored.names
    ):
        raise CheckpointError(f"{stored.folder}: has no quantized experts; {_MAKE_IT}")
    return weight
