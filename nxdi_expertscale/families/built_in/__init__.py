"""The families that are built in: those of NxDI's own models, and of models contributed to it."""

from __future__ import annotations

from nxdi_expertscale.families.built_in.contributed import CONTRIBUTED
from nxdi_expertscale.families.built_in.nxdi import LLAMA4, MIXTRAL, OF_NXDI, QWEN3_MOE
from nxdi_expertscale.families.declaration import MoEFamily

__all__ = ["BUILT_IN", "LLAMA4", "MIXTRAL", "OF_NXDI", "QWEN3_MOE"]

BUILT_IN: tuple[MoEFamily, ...] = (*OF_NXDI, *CONTRIBUTED)
