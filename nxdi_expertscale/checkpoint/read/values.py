"""The values that a checkpoint means, read in pieces of whole rows into memory that is reused."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nxdi_expertscale.checkpoint.chunks import as_rows
from nxdi_expertscale.checkpoint.read.files import Checkpoint, TensorReader
from nxdi_expertscale.checkpoint.read.tensors import FP8, BlockScale, Weight
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.errors import CheckpointError
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
    """A thread's memory, used again for each piece."""

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


class ValueReader:
    """Reads pieces of a checkpoint's tensors, from several threads at once."""

    def __init__(self, checkpoint: Checkpoint, reader: TensorReader) -> None:
        self._checkpoint = checkpoint
        self._reader = reader
        self.buffers = Buffers()

    def stored(self, weight: Weight, rows: range) -> torch.Tensor:
        """Rows of a tensor as they are on the disk.

        Returns:
            ``[rows, columns]`` in the stored dtype, or ``torch.uint8`` bytes where the dtype is
            not one of :data:`TORCH_DTYPES`. It is the thread's buffer.
        """
        tensor = weight.tensor
        total, columns = as_rows(tensor.shape)
        row_bytes = tensor.nbytes // total
        raw = self.buffers.take("raw", (len(rows) * row_bytes,))
        self._reader.read_rows_into(as_bytes(raw), tensor, rows)
        dtype = TORCH_DTYPES.get(tensor.dtype)
        return raw if dtype is None else raw.view(dtype).view(len(rows), columns)

    def values(self, weight: Weight, rows: range) -> torch.Tensor:
        """The values of rows of a tensor whose dtype is one of :data:`TORCH_DTYPES`.

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
            stored: The rows as they are on the disk, ``[rows, columns]``.
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
        """Scales of some rows of a weight with ``columns`` columns.

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
            raise CheckpointError(
                f"{self._checkpoint.folder / tensor.file}: {tensor.name}: has a scale that is not "
                "a positive number; download the file again"
            )
        return values[torch.arange(rows.start, rows.stop) // scale.rows - first]

    def expect_finite(self, tensor: StoredTensor, values: torch.Tensor) -> None:
        """Check that values, or figures that NaN and infinity go into, are finite.

        Raises:
            CheckpointError: They are not.
        """
        extremes = torch.stack([values.amax(), values.amin()])
        if not bool(torch.isfinite(extremes).all()):
            raise CheckpointError(
                f"{self._checkpoint.folder / tensor.file}: {tensor.name}: has NaN or infinity; "
                "download the file again"
            )
