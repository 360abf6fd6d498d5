"""A contributed model's own ``checkpoint_loader_fn``, which never reads a quantized checkpoint.

Kimi-K2's reads the model's own, and quantizes it anew at each load. With the flag on NxDI's is
called in its place (``models/application_base.py``), as for any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import seams
from nxdi_expertscale.patches.installed_release import checked_settings


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """One patch for each family whose models have a loader of their own."""
    return [
        Patch(
            seam=seams.own_loader(family),
            module=family.module,
            attribute=family.own_loader,
            wrapper=_reading_the_quantized(family, *family.own_loader.split(".")),
        )
        for family in families
        if family.own_loader is not None
    ]


def _reading_the_quantized(family: MoEFamily, owner: str, method: str) -> Callable[..., Any]:
    def load(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        settings = checked_settings(instance.config, (), family)
        if settings.is_on and settings.is_quantized and settings.quantized_checkpoints_path:
            return _inherited(instance, owner, method)(*args, **kwargs)
        return wrapped(*args, **kwargs)

    return load


def _inherited(instance: Any, owner: str, method: str) -> Callable[..., Any]:
    """The method that a class would have without its own."""
    classes = type(instance).__mro__
    names = [cls.__name__ for cls in classes]
    above = classes[names.index(owner) + 1 :]
    function = next(vars(cls)[method] for cls in above if method in vars(cls))
    return partial(function, instance)
