"""Converts rows of a source's weights into what is written for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nxdi_expertscale.checkpoint.read.chunks import row_ranges
from nxdi_expertscale.checkpoint.read.tensors import Weight
from nxdi_expertscale.checkpoint.read.values import TORCH_DTYPES, ValueReader
from nxdi_expertscale.checkpoint.write.plan import PlannedTensor, Treatment
from nxdi_expertscale.numerics import fp8

SAMPLED = 16
"""Of so many rows, one is measured: the error of a whole weight to a tenth of a dB, for nothing."""


@dataclass(frozen=True, slots=True)
class ConvertedRows:
    """Rows of a weight, before and after.

    Attributes:
        stored: As they are stored in the source, ``[rows, columns]``, or bytes of a dtype whose
            values are not read.
        outputs: What is written for them, by the name of the tensor: ``[rows, columns]``, and the
            scales ``[rows, 1]``, ``torch.float32``, of a weight that is quantized.
        is_below_floor: Whether a row is so small that the floor of the scale loses it; see
            :func:`~nxdi_expertscale.numerics.fp8.has_rows_below_floor`.
        energies: Signal and noise of a sample of the rows, one in :data:`SAMPLED`, where they are
            rounded; see :func:`~nxdi_expertscale.numerics.fp8.energies`.
    """

    stored: torch.Tensor
    outputs: Mapping[str, torch.Tensor]
    is_below_floor: bool = False
    energies: tuple[float, float] | None = None


class RowConverter:
    """Converts rows of a source's weights, from several threads at once."""

    def __init__(
        self, reader: ValueReader, *, exceeds_range: Callable[[Weight], bool] | None = None
    ) -> None:
        """Convert what a reader reads.

        Args:
            reader: Reads the source.
            exceeds_range: Whether any value of an FP8 weight is beyond Neuron's range, for who
                knows it without looking; by default the weight is read to find out.
        """
        self._reader = reader
        self._exceeds = self._look_at_range if exceeds_range is None else exceeds_range
        self._exceeding: dict[str, bool] = {}
        self._lock = threading.Lock()

    def convert(self, planned: PlannedTensor, rows: range) -> ConvertedRows:
        """Read rows of a weight and convert them as planned.

        A weight in FP8 with one scale for each channel keeps its values where they are in Neuron's
        range (±240). Otherwise they are halved and the scale is doubled: nothing is rounded twice.

        Args:
            planned: The weight, and what is done with it.
            rows: Which of its rows.

        Returns:
            The rows, in the thread's buffers until it is called again.

        Raises:
            CheckpointError: The source has NaN, infinity, or scales that are not positive.
        """
        weight = planned.weight
        # First, because it reads into the buffer that the rows are then read into.
        is_halved = _keeps_fp8(planned) and self._exceeds_range(weight)
        stored = self._reader.stored(weight, rows)
        if planned.treatment is Treatment.KEEP:
            outputs = self._keep(planned, stored)
        elif planned.treatment is Treatment.DEQUANTIZE:
            outputs = self._dequantize(planned, stored, rows)
        elif _keeps_fp8(planned):
            outputs = self._rescale(planned, stored, rows, is_halved=is_halved)
        else:
            return self._quantize(planned, stored, rows)
        return ConvertedRows(stored, outputs)

    def _keep(self, planned: PlannedTensor, stored: torch.Tensor) -> dict[str, torch.Tensor]:
        if planned.weight.tensor.dtype in TORCH_DTYPES:
            self._reader.check_finite(planned.weight.tensor, stored)
        return {planned.name: stored}

    def _dequantize(
        self, planned: PlannedTensor, stored: torch.Tensor, rows: range
    ) -> dict[str, torch.Tensor]:
        values = self._values(planned.weight, stored, rows)
        self._reader.check_finite(planned.weight.tensor, values)
        return {planned.name: values.to(TORCH_DTYPES[planned.dtype])}

    def _quantize(self, planned: PlannedTensor, stored: torch.Tensor, rows: range) -> ConvertedRows:
        shape, buffers = tuple(stored.shape), self._reader.buffers
        quotients = buffers.take("values", shape)
        quantized, scale = fp8.quantize_per_channel(
            self._values(planned.weight, stored, rows),
            scratch=quotients,
            out=buffers.take("quantized", shape),
        )
        self._reader.check_finite(planned.weight.tensor, scale)
        return ConvertedRows(
            stored,
            {planned.name: quantized, planned.scale_name: scale},
            fp8.has_rows_below_floor(quotients, scale),
            fp8.energies(quotients[::SAMPLED], quantized[::SAMPLED], scale[::SAMPLED]),
        )

    def _rescale(
        self, planned: PlannedTensor, stored: torch.Tensor, rows: range, *, is_halved: bool
    ) -> dict[str, torch.Tensor]:
        weight, buffers = planned.weight, self._reader.buffers
        assert weight.scale is not None
        scale = self._reader.scale(weight.scale, rows, weight.tensor.columns)
        if not is_halved:
            return {planned.name: stored, planned.scale_name: scale}
        halves = buffers.take("values", tuple(stored.shape))
        out = buffers.take("quantized", tuple(stored.shape))
        halved = fp8.halve(stored, scratch=halves, out=out)
        self._reader.check_finite(weight.tensor, halves)
        doubled = scale * 2
        self._reader.check_finite(weight.scale.tensor, doubled)
        return {planned.name: halved, planned.scale_name: doubled}

    def _values(self, weight: Weight, stored: torch.Tensor, rows: range) -> torch.Tensor:
        if weight.scale is None:
            return stored
        return self._reader.dequantized(stored, weight.scale, rows)

    def _exceeds_range(self, weight: Weight) -> bool:
        """Whether any value of an FP8 weight is beyond Neuron's range; found out once."""
        with self._lock:
            known = self._exceeding.get(weight.name)
        if known is None:
            known = self._exceeds(weight)
            with self._lock:
                self._exceeding[weight.name] = known
        return known

    def _look_at_range(self, weight: Weight) -> bool:
        return any(
            fp8.exceeds_range(self._reader.stored(weight, rows))
            for rows in row_ranges(weight.tensor)
        )


def _keeps_fp8(planned: PlannedTensor) -> bool:
    """Whether a weight that is to be FP8 is FP8 already, with one scale for each channel."""
    weight = planned.weight
    return (
        planned.treatment is Treatment.QUANTIZE
        and weight.scale is not None
        and weight.scale.columns >= weight.tensor.columns
    )
