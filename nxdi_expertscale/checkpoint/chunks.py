"""Cut tensors into pieces of whole rows: what is worked on at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

PIECE_ELEMENTS = 1 << 21
"""Elements of a piece: it bounds a worker's memory, and keeps Python's part of the time small."""


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """A shape as rows and columns; one with fewer than two axes has one column."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def row_ranges(shape: tuple[int, ...]) -> Iterator[range]:
    """Cut a tensor into pieces of whole rows, of nearly the same size."""
    rows, columns = as_rows(shape)
    if rows * columns == 0:
        return
    pieces = -(-rows // max(1, PIECE_ELEMENTS // columns))
    step = -(-rows // pieces)
    for start in range(0, rows, step):
        yield range(start, min(start + step, rows))
