"""Copies of weights with their axes exchanged, several times as fast as torch's own.

torch copies a transposed matrix element by element where the result has rows of its own width, and
in blocks where all of it is contiguous. Elements of one and two bytes are moved here as numbers of
four, in blocks, and taken apart afterwards: both are what torch has fast loops for.
"""

from __future__ import annotations

import sys

import torch

SCRATCH_BYTES = 1 << 21
"""Bytes that are transposed at a time: few enough for a cache."""

_WORD = 4
"""Bytes of the numbers that are moved."""


def copy_transposed(weight: torch.Tensor, out: torch.Tensor) -> None:
    """Copy a weight with its axes exchanged: ``out.copy_(weight.T)``, bit for bit.

    Args:
        weight: ``[out, in]``.
        out: ``[in, out]``, which may be a part of a larger tensor.
    """
    if not _is_of_words(weight, out):
        out.copy_(weight.T)
        return
    parts = _WORD // weight.itemsize
    words = weight.view(torch.int32)
    # A word holds neighbouring inputs, the first in its lowest bits.
    elements = out.view(_INTEGERS[weight.itemsize])
    rows = max(1, SCRATCH_BYTES // max(1, words.shape[1] * _WORD))
    scratch = words.new_empty(words.shape[1] * min(rows, words.shape[0]))
    for start in range(0, words.shape[0], rows):
        some = words[start : start + rows]
        turned = scratch[: some.numel()].view(some.shape[1], some.shape[0])
        turned.copy_(some.T)
        for part in range(parts):
            if part:
                turned.bitwise_right_shift_(8 * weight.itemsize)
            elements[part::parts, start : start + rows].copy_(turned)


_INTEGERS = {1: torch.uint8, 2: torch.int16}


def _is_of_words(weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the elements can be moved several at a time."""
    return (
        weight.dtype == out.dtype
        and weight.itemsize in _INTEGERS
        and weight.dim() == 2
        and out.shape == weight.T.shape
        and weight.is_contiguous()
        and weight.shape[1] * weight.itemsize % _WORD == 0
        and weight.storage_offset() * weight.itemsize % _WORD == 0
        and weight.device.type == "cpu"
        and out.device.type == "cpu"
        and sys.byteorder == "little"
    )
