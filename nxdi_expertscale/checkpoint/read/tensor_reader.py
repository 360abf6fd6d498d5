"""Reads rows of a checkpoint's tensors into buffers, without mapping files into memory."""

from __future__ import annotations

import numpy as np

from nxdi_expertscale.checkpoint.read.files import WeightFiles
from nxdi_expertscale.checkpoint.safetensors_format import ITEM_SIZES, StoredTensor
from nxdi_expertscale.sources.closing import Closing


class TensorReader(Closing):
    """Reads tensors of a checkpoint. Safe to use from several threads.

    Files stay open until it is closed.
    """

    def __init__(self, files: WeightFiles) -> None:
        self._files = files.folder.open(files.headers)

    def read_into(self, buffer: memoryview, file: str, offset: int) -> None:
        """Fill a buffer with the bytes of a file from an offset on.

        Raises:
            CheckpointError: The disk fails, or the file ends before, so it was cut after its
                header was read.
        """
        self._files.read_into(buffer, file, offset)

    def read_rows(self, tensor: StoredTensor, rows: range) -> bytearray:
        """The bytes of some rows of a tensor.

        Raises:
            CheckpointError: As :meth:`read_into`.
        """
        data = bytearray(len(rows) * (tensor.nbytes // tensor.rows))
        self.read_rows_into(memoryview(data), tensor, rows)
        return data

    def read_rows_into(self, buffer: memoryview, tensor: StoredTensor, rows: range) -> None:
        """Fill a buffer with the bytes of some rows of a tensor, in C order.

        Raises:
            CheckpointError: As :meth:`read_into`.
        """
        row_bytes = len(buffer) // max(1, len(rows))
        if tensor.stride is None:
            self.read_into(buffer, tensor.file, tensor.offset + rows.start * row_bytes)
            return
        item_size = ITEM_SIZES[tensor.dtype]
        inputs, width = tensor.shape[1], len(rows) * item_size
        transposed = bytearray(inputs * width)
        view = memoryview(transposed)
        for number in range(inputs):
            offset = tensor.offset + (number * tensor.stride + rows.start) * item_size
            self.read_into(view[number * width : (number + 1) * width], tensor.file, offset)
        by_input = np.frombuffer(transposed, f"u{item_size}").reshape(inputs, len(rows))
        np.frombuffer(buffer, f"u{item_size}").reshape(len(rows), inputs)[...] = by_input.T

    def close(self) -> None:
        """Close the files."""
        self._files.close()
