"""The plugin ``expertscale`` itself: the built-in families, and one module for each seam.

This package is the only place that knows NxDI's modules. Its modules import neither torch nor
NxDI when they are imported: they are loaded by ``import nxdi_expertscale``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import (
    application_base,
    checkpoint_loader,
    config,
    config_json,
    decoder_model_instance,
    inference_demo,
    model_builder,
    model_wrapper,
    neuronx_distributed_model_loader,
    own_loader,
    state_dict,
    trace,
)
from nxdi_expertscale.plugins.hookspecs import hookimpl


@hookimpl
def nxdi_moe_families() -> Iterable[MoEFamily]:
    """Contribute the families that are built in."""
    return BUILT_IN


@hookimpl
def nxdi_patches(families: Sequence[MoEFamily]) -> Iterable[Patch]:
    """Contribute the patches, those of the state dict for every family there is."""
    return [
        *config.patches(families),
        *config_json.patches(),
        *model_wrapper.patches(families),
        *decoder_model_instance.patches(families),
        *state_dict.patches(families),
        *own_loader.patches(families),
        *application_base.patches(families),
        *checkpoint_loader.patches(),
        *trace.patches(),
        *model_builder.patches(),
        *inference_demo.patches(),
        *neuronx_distributed_model_loader.patches(),
    ]
