"""Whether NxDI fuses a layer's experts as it is known to: a sample of them, found again or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

COMPARED_INPUTS = 2
"""Inputs of each channel that are compared: enough to tell one channel from another."""


@dataclass(frozen=True)
class FusedSample:
    """What one of NxDI's fused weights has to hold at some places, which tell how it is fused.

    Every channel of every expert is looked at, for scales belong to channels of experts; each
    expert at other inputs, so that all of them together cover the inputs.

    Attributes:
        num_inputs: Inputs of an expert's weight, without padding.
        values: ``[E, parts, COMPARED_INPUTS, out]``, of the weights' dtype: what those of each
            expert's projections, ``[out, in]``, hold.
    """

    num_inputs: int
    values: torch.Tensor

    @classmethod
    def take(cls, weights: Sequence[Sequence[torch.Tensor]]) -> FusedSample:
        """Take a sample of the weights that a fused one is made of.

        Args:
            weights: For each expert, the weights ``[out, in]`` of its projections, all of them of
                one shape and dtype.
        """
        first = weights[0][0]
        out, num_inputs = first.shape
        count = min(COMPARED_INPUTS, num_inputs)
        values = torch.empty(len(weights), len(weights[0]), count, out, dtype=first.dtype)
        sample = cls(num_inputs, values)
        starts = sample._starts().tolist()
        for parts, places, start in zip(weights, values, starts, strict=True):
            for weight, place in zip(parts, places, strict=True):
                place.copy_(weight.narrow(1, start, count).t())
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
        experts = torch.arange(num_experts)[:, None]
        inputs = self._starts()[:, None] + torch.arange(count)
        rows = fused.view(torch.uint8)[experts, inputs]
        found = rows.reshape(num_experts, count, parts, -1)
        return torch.equal(
            found[..., : out * fused.itemsize].transpose(1, 2), self.values.view(torch.uint8)
        )

    def _starts(self) -> torch.Tensor:
        """For each expert, the first of the inputs that are compared."""
        num_experts, _, count, _ = self.values.shape
        return torch.arange(num_experts) * (self.num_inputs - count) // max(1, num_experts - 1)
