"""What the installed NxDI and NxD do, asked of themselves, and settings checked against it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.patches import required_seams, seams
from nxdi_expertscale.settings import rules
from nxdi_expertscale.settings.settings import Settings, Upstream, read_settings

if TYPE_CHECKING:
    import torch

_MOE_V2 = "neuronx_distributed_inference.modules.moe_v2"
"""Where a family's experts are built from the neuron config's own settings for them."""


def checked_settings(
    model_config: Any,
    families: Sequence[MoEFamily],
    family: MoEFamily | None = None,
    *,
    is_built: bool = False,
) -> Settings:
    """Read and check an ``InferenceConfig`` and its neuron config.

    To be called wherever the flag counts: a config may have been changed since it was made.

    Args:
        model_config: The ``InferenceConfig``.
        families: The families that are in force.
        family: The model's family where it is known by other means than its config.
        is_built: Whether the model is being built: its converter must have been seen by now. A
            config may be made before the module of a contributed model is imported.

    Raises:
        ConfigurationError: The model could not run.
        IncompatibleUpstreamError: A seam that this model needs does not hold.
    """
    neuron_config = getattr(model_config, "neuron_config", None)
    settings = read_settings(neuron_config, model_config, families, family)
    upstream = upstream_of(settings, neuron_config)
    settings = dataclasses.replace(settings, upstream=upstream)
    rules.check(settings)
    if settings.is_on and settings.is_quantized and settings.family is not None:
        names = seams.needed_by_model(settings.family)
        required_seams.require_seams(names, load=True, may_wait=not is_built)
    return settings


def upstream_of(settings: Settings, neuron_config: Any) -> Upstream:
    """What the installed release does with the experts of a model.

    NxD is asked for its kernels only where they matter: with the flag on.
    """
    if settings.family is None:
        return Upstream()
    asks = settings.is_on and settings.is_quantized and not runs_on_cpu(neuron_config)
    cores = _kernel_cores() if asks else frozenset[int]()
    return Upstream(_reads_moe_settings(settings.family), cores)


def runs_on_cpu(neuron_config: Any) -> bool:
    """Whether upstream runs this model on a CPU (``neuronx_distributed.utils.cpu_mode``)."""
    return bool(getattr(neuron_config, "on_cpu", False)) or os.environ.get("NXD_CPU_MODE") == "1"


def quantized_dtype(neuron_config: Any) -> torch.dtype | None:
    """The dtype of quantized weights that a neuron config asks for, if it says so."""
    from neuronx_distributed.quantization.quantization_config import QuantizedDtype

    wanted = getattr(neuron_config, "quantization_dtype", None)
    dtype = QuantizedDtype.get_dtype(wanted) if isinstance(wanted, str) else wanted
    return getattr(dtype, "value", dtype)


def _reads_moe_settings(family: MoEFamily) -> bool:
    name = seams.state_dict(family)
    module = next((seam.module for seam in engine.status() if seam.seam == name), family.module)
    modeling = sys.modules.get(module)
    initialize = getattr(modeling, "initialize_moe_module", None)
    return getattr(initialize, "__module__", _MOE_V2) == _MOE_V2


def _kernel_cores() -> frozenset[int]:
    """Numbers of logical cores for which this NxD has a blockwise kernel."""
    from neuronx_distributed.modules.moe import blockwise

    available = set()
    for cores in (1, 2):
        wanted = blockwise.KernelConfig(blockwise.LogicalNCConfig(cores), use_block_parallel=False)
        with contextlib.suppress(blockwise.KernelAvailabilityError):
            blockwise.check_kernel_availability(wanted)
            available.add(cores)
    return frozenset(available)
