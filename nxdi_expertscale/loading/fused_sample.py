"""Whether NxDI fuses a layer's experts as it is known to: a sample of them, found again or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nxdi_expertscale.checkpoint.parallel import available_cores, for_each

COMPARED_INPUTS = 2
"""Inputs of each channel that are compared: enough to tell one channel from another."""

MAX_WORKERS = 4
"""Threads that take a sample: it is a matter of milliseconds."""


@dataclass(frozen=True)
class FusedSample:
    """What one of NxDI's fused weights has to hold at some places, which tell how it is fused.

    Every channel of every expert is looked at, for scales belong to channels of experts; each
    expert at other inputs, so that all of them together cover the inputs.

    Attributes:
        num_inputs: Inputs of an expert's weight, without padding.
        values: ``[E, parts, COMPARED_INPUTS, out]``, of the weights' dtype: what those of each
            expert's projections, ``[out, in]``, hold. On the device ``meta`` only shapes and
            dtypes are compared.
    """

    num_inputs: int
    values: torch.Tensor

    @classmethod
    def take(
        cls, weights: Sequence[Sequence[torch.Tensor]], *, workers: int | None = None
    ) -> FusedSample:
        """Take a sample of the weights that a fused one is made of.

        Args:
            weights: For each expert, the weights ``[out, in]`` of its projections, all of them of
                one shape and dtype.
            workers: Threads; by default as many as there are cores, up to :data:`MAX_WORKERS`.
        """
        first = weights[0][0]
        out, num_inputs = first.shape
        count = min(COMPARED_INPUTS, num_inputs)
        shape = (len(weights), len(weights[0]), count, out)
        values = torch.empty(shape, dtype=first.dtype, device=first.device)
        sample = cls(num_inputs, values)
        if values.is_meta:
            return sample

        def copy(expert: int) -> None:
            start = expert * sample._step
            for weight, place in zip(weights[expert], values[expert], strict=True):
                place.copy_(weight.narrow(1, start, count).t())

        for_each(copy, iter(range(len(weights))), workers or min(MAX_WORKERS, available_cores()))
        return sample

    def is_in(self, fused: torch.Tensor) -> bool:
        """Whether a fused weight ``[E, in, dim]``, padded or not, holds the sample."""
        num_experts, parts, count, out = self.values.shape
        if (
            fused.dtype != self.values.dtype
            or fused.shape[0] != num_experts
            or fused.shape[1] < self.num_inputs
            or fused.shape[2] % parts
        ):
            return False
        if self.values.is_meta:
            return True
        rows = fused.view(torch.uint8).flatten(0, 1)
        stride = fused.shape[1] + self._step
        return all(
            torch.equal(
                rows[number::stride].view(num_experts, parts, -1)[..., : out * fused.itemsize],
                self.values[:, :, number].view(torch.uint8),
            )
            for number in range(count)
        )

    @property
    def _step(self) -> int:
        """How many inputs further on the sample of the next expert begins."""
        num_experts, _, count, _ = self.values.shape
        return (self.num_inputs - count) // max(1, num_experts - 1)
