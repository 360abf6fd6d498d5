"""A quantized model beside the same one unquantized: its parameters as numbers, its parts run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

WITHIN_FP8 = 0.06
"""What FP8 may cost a parameter or a block: its own rounding is 2.7%."""


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


@dataclass(frozen=True)
class Call:
    """A call of a part of a model: what it was given, and the hidden states that came of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


@contextmanager
def first_calls(module: torch.nn.Module, paths: Iterable[str]) -> Iterator[dict[str, Call]]:
    """The first call of each of these parts of a model while the context lasts, by its path."""
    calls: dict[str, Call] = {}

    def keep_as(path: str) -> Callable[..., None]:
        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.setdefault(path, Call(args, kwargs, hidden_states(output)))

        return keep

    handles = [
        module.get_submodule(path).register_forward_hook(keep_as(path), with_kwargs=True)
        for path in paths
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def repeat(module: torch.nn.Module, call: Call) -> torch.Tensor:
    """The hidden states that a part of a model gives for a call of another one."""
    with torch.no_grad():
        return hidden_states(module(*call.args, **call.kwargs))


def hidden_states(output: Any) -> torch.Tensor:
    """What a part of a layer gives on, in each form that NxDI has for it."""
    if isinstance(output, torch.Tensor):
        return output
    found: torch.Tensor | None = getattr(output, "hidden_states", None)
    return found if found is not None else cast(torch.Tensor, output[0])
