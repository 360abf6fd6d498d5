"""The plugin ``expertscale`` itself: the built-in families, and one module for each seam."""

from __future__ import annotations

from collections.abc import Iterable

from nxdi_expertscale.families import BUILT_IN, MoEFamily
from nxdi_expertscale.hookspecs import hookimpl


@hookimpl
def nxdi_moe_families() -> Iterable[MoEFamily]:
    """Contribute the families that are built in."""
    return BUILT_IN
