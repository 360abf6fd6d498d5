"""A quantized model beside the same one unquantized: every parameter, every block, the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nxdi_expertscale.testing.whole_model import dequantized, relative_error


@dataclass(frozen=True)
class Comparison:
    """How far a model is off, each a norm of the difference over the norm of the original.

    Attributes:
        parameters: Of each parameter, dequantized.
        attention: Of each layer's attention, given the same input.
        moe: Of each MoE block, given the same input.
        logits: Of the last token's logits.
    """

    parameters: Mapping[str, float]
    attention: tuple[float, ...]
    moe: tuple[float, ...]
    logits: float

    def beyond(self, within: float) -> dict[str, float]:
        """What is further off; the logits, to which every layer adds, by more than twice that."""
        errors = dict(self.parameters)
        errors |= {f"attention of layer {n}": error for n, error in enumerate(self.attention)}
        errors |= {f"MoE block {n}": error for n, error in enumerate(self.moe)}
        found = {name: error for name, error in errors.items() if not error < within}
        return found if self.logits < 2 * within else {**found, "logits": self.logits}


def parameter_errors(
    state_dict: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """The error of each parameter.

    Raises:
        AssertionError: The models do not have the same parameters, of the same shapes.
    """
    ours, theirs = dequantized(state_dict), dequantized(reference)
    shapes = {name: list(tensor.shape) for name, tensor in ours.items()}
    assert shapes == {name: list(tensor.shape) for name, tensor in theirs.items()}
    return {name: relative_error(ours[name], theirs[name]) for name in ours}
