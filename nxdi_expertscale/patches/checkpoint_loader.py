"""NxDI's ``checkpoint_loader_fn``: a checkpoint converted without its values.

What NxDI's converters, and this package around them, make of a checkpoint is known by names, shapes
and dtypes alone, in seconds and without memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import application_base, seams

_leaves_out_values = ContextVar("_leaves_out_values", default=False)


def patches() -> list[Patch]:
    """State dicts on the device ``meta``, where :func:`without_values` asks for them."""
    return [
        Patch(
            seam=seams.LOAD_STATE_DICT,
            module=application_base.MODULE,
            attribute="load_state_dict",
            wrapper=_load_state_dict,
            find_incompatibility=_incompatibility,
        )
    ]


def _incompatibility(module: ModuleType) -> str | None:
    try:
        inspect.signature(module.load_state_dict).bind("folder")
    except TypeError as error:
        return f"load_state_dict is not called with a folder: {error}"
    if not refers_to(module.NeuronApplicationBase.get_state_dict, "load_state_dict"):
        return "NeuronApplicationBase.get_state_dict does not call load_state_dict"
    return None


def without_values(checkpoint_loader: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Make a loader that has NxDI convert a checkpoint on the device ``meta``.

    Args:
        checkpoint_loader: ``NeuronApplicationBase.checkpoint_loader_fn``.

    Returns:
        The same with tensors that have a name, a shape and a dtype, and no values.
    """

    def load() -> dict[str, Any]:
        import torch

        token = _leaves_out_values.set(True)
        try:
            # For what a converter makes itself, such as ranks and padding.
            with torch.device("meta"):
                return checkpoint_loader()
        finally:
            _leaves_out_values.reset(token)

    return load


def reads_through_load_state_dict(checkpoint_loader: Any) -> bool:
    """Whether a ``ModelBuilder``'s loader is NxDI's own, which :func:`without_values` reaches."""
    name = getattr(checkpoint_loader, "__qualname__", "")
    return name == "NeuronApplicationBase.checkpoint_loader_fn"


def _load_state_dict(
    wrapped: Callable[..., dict[str, Any]],
    _: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    if not _leaves_out_values.get():
        return wrapped(*args, **kwargs)
    import torch

    from nxdi_expertscale.checkpoint.read.without_values import has_headers, read_without_values

    folder = Path(*inspect.signature(wrapped).bind(*args, **kwargs).args)
    with torch.device("cpu"):
        if has_headers(folder):
            return read_without_values(folder)
        # A pickle, which has to be read whole.
        return {name: tensor.to("meta") for name, tensor in wrapped(*args, **kwargs).items()}
