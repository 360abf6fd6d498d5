"""The values of a checkpoint's weights, read by rows into memory that is used again."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.checkpoint.read.scales import BlockScale
from nxdi_expertscale.checkpoint.read.tensors import FP8, Weight
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.errors import damaged
from nxdi_expertscale.numerics import fp8

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    FP8: torch.float8_e4m3fn,
}
"""torch's dtypes by the format's names, of those whose values are read."""


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


@dataclass
class Buffers(threading.local):
    """A thread's memory, used again for each chunk."""

    raw: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float32))
    quantized: torch.Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.float8_e4m3fn)
    )

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A buffer's memory in a shape; what was taken from it before is overwritten."""
        buffer: torch.Tensor = getattr(self, name)
        count = math.prod(shape)
        if buffer.numel() < count:
            buffer = torch.empty(count, dtype=buffer.dtype)
            setattr(self, name, buffer)
        return buffer[:count].view(shape)


class RowReader(Protocol):
    """Where bytes of tensors come from: a ``TensorReader``, or what stands for one."""

    def read_into(self, buffer: memoryview, file: str, offset: int) -> None:
        """Fill a buffer with the bytes of a file from an offset on."""

    def read_rows_into(self, buffer: memoryview, tensor: StoredTensor, rows: range) -> None:
        """Fill a buffer with the bytes of some rows of a tensor, in C order."""


class ValueReader:
    """Reads rows of a checkpoint's weights, from several threads at once.

    Attributes:
        buffers: The memory of each thread. What a method returns lies in it, until it is called
            again.
    """

    def __init__(self, files: WeightFiles, reader: RowReader) -> None:
        self._files = files
        self._reader = reader
        self.buffers = Buffers()

    def stored(self, weight: Weight, rows: range) -> torch.Tensor:
        """Rows of a weight as they are stored.

        Args:
            weight: The weight.
            rows: Which of its rows.

        Returns:
            ``[rows, columns]`` in the stored dtype, or ``torch.uint8`` bytes where the dtype is
            not one of :data:`TORCH_DTYPES`. It is the thread's buffer.
        """
        tensor = weight.tensor
        raw = self.buffers.take("raw", (len(rows) * (tensor.nbytes // tensor.rows),))
        self._reader.read_rows_into(as_bytes(raw), tensor, rows)
        dtype = TORCH_DTYPES.get(tensor.dtype)
        return raw if dtype is None else raw.view(dtype).view(len(rows), tensor.columns)

    def values(self, weight: Weight, rows: range) -> torch.Tensor:
        """The values of rows of a weight whose dtype is one of :data:`TORCH_DTYPES`.

        Args:
            weight: The weight.
            rows: Which of its rows.

        Returns:
            ``[rows, columns]``, ``torch.float32``. It is the thread's buffer.

        Raises:
            CheckpointError: A scale is not a positive number.
        """
        stored = self.stored(weight, rows)
        if weight.scale is not None:
            return self.dequantized(stored, weight.scale, rows)
        return self.buffers.take("values", tuple(stored.shape)).copy_(stored)

    def dequantized(self, stored: torch.Tensor, scale: BlockScale, rows: range) -> torch.Tensor:
        """The values of rows of a quantized weight.

        Args:
            stored: The rows as they are stored, ``[rows, columns]``.
            scale: The weight's scale.
            rows: Which rows they are.

        Returns:
            ``[rows, columns]``, ``torch.float32``. It is the thread's buffer.

        Raises:
            CheckpointError: A scale is not a positive number.
        """
        values = fp8.decode(stored, out=self.buffers.take("values", tuple(stored.shape)))
        return fp8.scale_blocks_(values, self.scale(scale, rows, stored.shape[1]), scale.columns)

    def scale(self, scale: BlockScale, rows: range, columns: int) -> torch.Tensor:
        """The scales of rows of a weight.

        Args:
            scale: The weight's scale.
            rows: Which of the weight's rows.
            columns: Number of the weight's columns.

        Returns:
            ``[rows, blocks of columns]``, ``torch.float32``.

        Raises:
            CheckpointError: A scale is not a positive number.
        """
        tensor, blocks = scale.tensor, -(-columns // scale.columns)
        first, last = rows.start // scale.rows, (rows.stop - 1) // scale.rows
        dtype = TORCH_DTYPES[tensor.dtype]
        stored = torch.empty((last - first + 1, blocks), dtype=dtype)
        offset = tensor.offset + first * blocks * dtype.itemsize
        self._reader.read_into(as_bytes(stored), tensor.file, offset)
        values = stored.to(torch.float32)
        if not bool((torch.isfinite(values) & (values > 0)).all()):
            raise damaged(self._files.location(tensor), "has a scale that is not a positive number")
        return values[torch.arange(rows.start, rows.stop) // scale.rows - first]

    def check_finite(self, tensor: StoredTensor, values: torch.Tensor) -> None:
        """Check that values, or results that NaN and infinity carry over to, are finite.

        Args:
            tensor: The tensor that they come from.
            values: Of any shape and float dtype.

        Raises:
            CheckpointError: They are not.
        """
        extremes = torch.stack([values.amax(), values.amin()])
        if not bool(torch.isfinite(extremes).all()):
            raise damaged(self._files.location(tensor), "has NaN or infinity")
