"""What a plugin may add. Implement a function of the same name, marked with ``hookimpl``.

A plugin is a module (or an object) named in the entry point group ``nxdi.plugins``::

    # pyproject.toml
    [project.entry-points."nxdi.plugins"]
    mymodel = "mymodel_nxdi"

    # mymodel_nxdi.py
    from nxdi_expertscale import MoEFamily, hookimpl

    @hookimpl
    def nxdi_moe_families():
        return [MoEFamily(name="mymodel", model_types=("mymodel",), converter="...:...")]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from nxdi_expertscale.families.declaration import MoEFamily
    from nxdi_expertscale.hooking.patch import Patch

PROJECT = "nxdi"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def nxdi_moe_families() -> Iterable[MoEFamily]:  # type: ignore[empty-body]
    """Contribute families of mixture-of-experts models.

    Called when plugins are loaded, which any reader of a checkpoint may cause. A model type may
    be claimed by one family only.

    Returns:
        The families.
    """


@hookspec
def nxdi_patches(families: Sequence[MoEFamily]) -> Iterable[Patch]:  # type: ignore[empty-body]
    """Contribute patches, each applied when the module that it names is imported.

    Called when plugins are loaded, after ``nxdi_moe_families``. It must not import what it
    patches.

    Args:
        families: The families of all plugins that are loaded.

    Returns:
        The patches.
    """
