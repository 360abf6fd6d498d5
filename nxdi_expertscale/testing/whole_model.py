"""A quantized model beside the same one unquantized: every parameter, every block, the logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

WITHIN_FP8 = 0.06
"""What FP8 may cost a parameter or a block: its own rounding is 2.7%."""


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


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference, as a share of the reference's norm."""
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm()) if difference else 0.0


def dequantized(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of NxDI's module in full precision, without their scales."""
    found = {}
    for name, tensor in state_dict.items():
        scale = state_dict.get(f"{name.removesuffix('weight')}scale")
        if name.endswith("weight") and scale is not None and tensor.dtype.itemsize == 1:
            found[name] = tensor.to(torch.float32) * scale
        elif not name.endswith(".scale"):
            found[name] = tensor.to(torch.float32)
    return found


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


@contextmanager
def calls_of_attention(module: Any) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
    """The calls of each layer's attention, in the order of the layers: arguments and output."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, output))

    handles = [
        layer.self_attn.register_forward_hook(keep, with_kwargs=True) for layer in module.layers
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def hidden_states(output: Any) -> torch.Tensor:
    """What a part of a layer gives on, in each form that NxDI has for it."""
    if isinstance(output, torch.Tensor):
        return output
    found: torch.Tensor | None = getattr(output, "hidden_states", None)
    return found if found is not None else cast(torch.Tensor, output[0])
