"""Weights cut into chunks of whole rows: what is read and worked on at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nxdi_expertscale.checkpoint.read.tensors import Weight
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor

CHUNK_ELEMENTS = 1 << 21
"""Elements of a chunk: it bounds a worker's memory, and keeps Python's part of the time small."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Whole rows of a weight.

    Attributes:
        weight: The weight.
        number: Which of the weight's chunks it is, from 0.
        rows: The rows.
    """

    weight: Weight
    number: int
    rows: range

    @property
    def nbytes(self) -> int:
        """Bytes of it in the checkpoint."""
        tensor = self.weight.tensor
        return tensor.nbytes * len(self.rows) // tensor.rows


def chunks_of(weights: Iterable[Weight]) -> Iterator[Chunk]:
    """Cut weights into chunks, one weight after the other."""
    for weight in weights:
        for number, rows in enumerate(row_ranges(weight.tensor)):
            yield Chunk(weight, number, rows)


def row_ranges(tensor: StoredTensor) -> Iterator[range]:
    """Cut a tensor's rows into ranges of nearly the same length, one for each chunk."""
    rows, columns = tensor.rows, tensor.columns
    if rows * columns == 0:
        return
    count = -(-rows // max(1, CHUNK_ELEMENTS // columns))
    step = -(-rows // count)
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))
