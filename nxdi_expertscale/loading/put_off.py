"""Experts' weights whose transposition is put off until NxDI's converter copies them.

NxDI's converters, and those of its contributed models, fuse a layer's experts by
``fused[part].copy_(state_dict[key].T.detach().clone())``, or an assignment of the same
(``models/qwen3_moe/modeling_qwen3_moe.py``): a copy of each weight, and another one element by
element. The tensors that they are given here make one pass of the two, in blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.loading.fused_sample import Samplers, take_now
from nxdi_expertscale.loading.garbage import only_new_objects_searched
from nxdi_expertscale.loading.huge_pages import use_huge_pages
from nxdi_expertscale.loading.threads import one_thread
from nxdi_expertscale.numerics.transpose import copy_transposed

VARIABLE = "NXDI_EXPERTSCALE_FAST_CONVERSION"
"""The environment variable that turns all of it off, with the value ``0``."""

StateDict = dict[str, torch.Tensor]

_ALIKE = frozenset({"shape", "dtype", "device", "ndim", "size", "dim", "numel"})
"""What is the same of a weight, and of a copy that is put off."""

_TRANSPOSING, _DETACHING, _COPYING = ("T", "t"), "detach", "clone"


def is_turned_off() -> bool:
    """Whether the environment asks for NxDI's converters as they are."""
    return os.environ.get(VARIABLE) == "0"


class PutOffCopy(torch.Tensor):
    """A weight, its transpose, or a copy of that which has not been made.

    It is made when something is done with it, other than to copy it into another tensor, and is
    then a plain tensor, the one that torch would have made.
    """

    _weight: torch.Tensor
    """``[out, in]``."""
    _is_transposed: bool
    _is_copy: bool
    _sampler: Callable[[torch.Tensor], None] | None
    """Is given the weight, or a copy, as ``[in, out]``, when it is read."""
    _made: torch.Tensor | None
    _writes: int
    """How often the weight had been written to."""

    @staticmethod
    def of(
        weight: torch.Tensor,
        *,
        is_transposed: bool = False,
        is_copy: bool = False,
        sampler: Callable[[torch.Tensor], None] | None = None,
    ) -> PutOffCopy:
        """The tensor that stands for a plain weight ``[out, in]``, or for what is made of it."""
        seen = weight.T if is_transposed else weight
        made: PutOffCopy = torch.Tensor._make_subclass(PutOffCopy, seen)
        made._weight, made._is_transposed, made._is_copy = weight, is_transposed, is_copy
        made._sampler, made._made, made._writes = sampler, None, weight._version
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = _name(func)
        if len(args) == 1 and isinstance(args[0], cls) and not kwargs:
            if name in _ALIKE:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args)
            found = args[0]._without_a_copy(name)
            if found is not None:
                return found
        if name in ("copy_", "__setitem__") and not kwargs and _fill(name, *args):
            return args[0] if name == "copy_" else None
        return func(*_plain(args), **_plain(kwargs or {}))

    def _without_a_copy(self, name: str) -> PutOffCopy | None:
        """The result of a function that takes a tensor alone, if it can be put off as well."""
        if self._is_copy:
            return None
        transposes = name in _TRANSPOSING and not self._is_transposed
        if not transposes and name not in (_DETACHING, _COPYING):
            return None
        return self.of(
            self._weight,
            is_transposed=self._is_transposed or transposes,
            is_copy=name == _COPYING,
            sampler=self._sampler,
        )

    def as_plain(self) -> torch.Tensor:
        """The tensor that this one stands for; the same one every time."""
        if self._made is None:
            self._check_unchanged()
            if self._sampler is not None:
                self._sampler(self._weight.T)
            seen = self._weight.T if self._is_transposed else self._weight
            self._made = seen.clone() if self._is_copy else seen
        return self._made

    def _check_unchanged(self) -> None:
        if self._is_copy and self._weight._version != self._writes:
            raise IncompatibleUpstreamError(
                "NxDI's converter writes to an expert's weight of which it has made a copy; set "
                f"{VARIABLE}=0, and report it"
            )

    def copy_into(self, place: torch.Tensor) -> None:
        """Copy what this tensor stands for into a part of another, ``[…, in, out]``."""
        if self._made is not None or not self._is_transposed:
            place.copy_(self.as_plain())
            return
        self._check_unchanged()
        with one_thread():
            use_huge_pages(place)
            transposed = place.view(place.shape[-2:])
            copy_transposed(self._weight, transposed)
        if self._sampler is not None:
            self._sampler(transposed)


def convert_in_one_pass(
    convert: Callable[[], StateDict],
    state_dict: StateDict,
    family: MoEFamily,
    samplers: Samplers = MappingProxyType({}),
) -> StateDict:
    """Run NxDI's converter, with experts' weights that are copied and transposed in one pass.

    Args:
        convert: Converts ``state_dict``.
        state_dict: A checkpoint's tensors, each expert's weight ``[out, in]``; the experts'
            weights are exchanged while ``convert`` runs.
        family: The names in it.
        samplers: For some of the weights what is given them as ``[in, out]``, when they are read.

    Returns:
        What ``convert`` gave: the same numbers, to the last bit, in plain tensors.

    Raises:
        IncompatibleUpstreamError: The converter writes to a weight after it has made a copy of it.
    """
    if is_turned_off():
        take_now(samplers, state_dict)
        return convert()
    for name, weight in state_dict.items():
        place = family.names.parse_expert_key(name)
        if place is not None and place.suffix == "weight" and _can_be_put_off(weight):
            state_dict[name] = PutOffCopy.of(weight, sampler=samplers.get(name))
        elif name in samplers:
            samplers[name](weight.T)
    try:
        with only_new_objects_searched():
            converted = convert()
    finally:
        _make_plain(state_dict)
    if converted is not state_dict:
        _make_plain(converted)
    return converted


def _can_be_put_off(weight: torch.Tensor) -> bool:
    return (
        type(weight) is torch.Tensor
        and weight.dim() == 2
        and weight.device.type == "cpu"
        and not weight.requires_grad
        and not weight.is_inference()
    )


def _make_plain(state_dict: StateDict) -> None:
    for name, tensor in state_dict.items():
        if isinstance(tensor, PutOffCopy):
            state_dict[name] = tensor.as_plain()


def _name(func: Callable[..., Any]) -> str:
    """The name of one of torch's functions, or of the attribute that it gives."""
    owner = func.__self__ if func.__name__ == "__get__" else func  # type: ignore[attr-defined]
    return str(owner.__name__)


def _fill(name: str, place: Any, *args: Any) -> bool:
    """Copy a tensor that is put off into a plain one, or into one part of it, if it can be."""
    if type(place) is not torch.Tensor or not isinstance(args[-1], PutOffCopy):
        return False
    if name == "__setitem__":
        if not _is_of_slices(args[0]):
            return False
        place = place[args[0]]
    elif len(args) > 1:
        return False
    tensor, weight = args[-1], args[-1]._weight
    if (
        place.dtype != weight.dtype
        or place.device != weight.device
        or place.shape[-2:] != tensor.shape
        or place.numel() != tensor.numel()
    ):
        return False
    tensor.copy_into(place)
    return True


def _is_of_slices(index: object) -> bool:
    """Whether an index makes a view, and no copy."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(type(part) in (int, slice) for part in parts)


def _plain(value: Any) -> Any:
    if isinstance(value, PutOffCopy):
        return value.as_plain()
    if type(value) is dict:
        return {name: _plain(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value
