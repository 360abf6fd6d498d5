"""Whether NxDI fuses a layer's experts as it is known to: a sample of them, found again or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

COMPARED_INPUTS = 2
"""Inputs of each channel that are compared: enough to tell one channel from another."""

Samplers = Mapping[str, Callable[[torch.Tensor], None]]
"""For each expert's weight what takes its part of a sample, given ``[in, out]``."""


@dataclass(frozen=True)
class FusedSample:
    """What one of NxDI's fused weights has to hold at some places, which tell how it is fused.

    Every channel of every expert is looked at, for scales belong to channels of experts; each
    expert at other inputs, so that all of them together cover the inputs. An expert's part is
    taken when its weight is read anyhow: to look at every channel of weights that are only mapped
    takes ten times as long.

    Attributes:
        num_inputs: Inputs of an expert's weight, without padding.
        values: ``[E, parts, COMPARED_INPUTS, out]``, of the weights' dtype: what those of each
            expert's projections, ``[out, in]``, hold. On the device ``meta`` only shapes and
            dtypes are compared.
    """

    num_inputs: int
    values: torch.Tensor
    _taken: set[tuple[int, int]] = field(default_factory=set)

    @classmethod
    def of(cls, num_experts: int, parts: int, weight: torch.Tensor) -> FusedSample:
        """A sample of which nothing has been taken.

        Args:
            num_experts: Experts of the layer.
            parts: Projections that are fused into one weight.
            weight: That of one expert's projection, ``[out, in]``; the others have its shape and
                dtype.
        """
        out, num_inputs = weight.shape
        shape = (num_experts, parts, min(COMPARED_INPUTS, num_inputs), out)
        return cls(num_inputs, torch.empty(shape, dtype=weight.dtype, device=weight.device))

    def take(self, expert: int, part: int, transposed: torch.Tensor) -> None:
        """Take an expert's part of the sample. What was taken first counts.

        Args:
            expert: The expert's number.
            part: Which of its projections, in the order in which they are fused.
            transposed: The projection's weight, or a copy of it, as ``[in, out]``.
        """
        if (expert, part) in self._taken:
            return
        self._taken.add((expert, part))
        if not self.values.is_meta:
            count = self.values.shape[2]
            self.values[expert, part].copy_(transposed.narrow(0, expert * self._step, count))

    def is_in(self, fused: torch.Tensor) -> bool:
        """Whether a fused weight ``[E, in, dim]``, padded or not, holds the sample.

        A weight that nobody has read is in none.
        """
        num_experts, parts, count, out = self.values.shape
        if (
            len(self._taken) < num_experts * parts
            or fused.dtype != self.values.dtype
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


def take_now(samplers: Samplers, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Take the samples of weights that are to be read by something that takes none.

    Args:
        samplers: What takes them.
        state_dict: The weights, ``[out, in]``; those that are not there are passed over.
    """
    for name, sampler in samplers.items():
        if name in state_dict:
            sampler(state_dict[name].T)
