"""The seam ``neuronx_distributed_inference.models.config``: the flag, and its early checks."""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nxdi_expertscale import device_switches, flag
from nxdi_expertscale.activation import FEATURE, Patch, mentions, require
from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.families import MoEFamily
from nxdi_expertscale.patches import seams

if TYPE_CHECKING:
    import torch

MODULE = "neuronx_distributed_inference.models.config"

_MOE_V2 = "neuronx_distributed_inference.modules.moe_v2"
"""Where a family's experts are built from the neuron config's own settings for them."""


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The flag on ``MoENeuronConfig``, the checks once the model is known, and a guard."""
    return [
        Patch(
            seam=seams.CONFIG,
            module=MODULE,
            attribute="MoENeuronConfig.__init__",
            wrapper=_accept_flag,
            misfit=_config_misfit,
            native=lambda module: mentions(module.MoENeuronConfig.__init__, FEATURE),
        ),
        Patch(
            seam=seams.INFERENCE_CONFIG,
            module=MODULE,
            attribute="InferenceConfig.__init__",
            wrapper=_checking_model(families),
        ),
        Patch(
            seam=seams.FLAG_GUARD,
            module=MODULE,
            attribute="NeuronConfig.__init__",
            wrapper=_refuse_flag_without_seam,
            guard=True,
        ),
    ]


def _config_misfit(module: ModuleType) -> str | None:
    parent = getattr(module, "NeuronConfig", None)
    if not isinstance(parent, type) or not issubclass(module.MoENeuronConfig, parent):
        return "MoENeuronConfig is no subclass of NeuronConfig"
    parameters = inspect.signature(module.MoENeuronConfig.__init__).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return "MoENeuronConfig.__init__ takes no further keywords"
    return None


def _accept_flag(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    value = flag.parse(kwargs.pop(flag.NAME, False))
    if value:
        require(seams.needed_by_config())
    # An attribute of the config, so that upstream writes it to JSON and copies it.
    setattr(instance, flag.NAME, value)
    wrapped(*args, **kwargs)
    flag.check_neuron_config(instance)
    if value and flag.is_quantized(instance) and flag.is_fp8(instance):
        device_switches.turn_on()


def _checking_model(families: Sequence[MoEFamily]) -> Callable[..., None]:
    def check_after_init(
        wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        wrapped(*args, **kwargs)
        check(instance, families)

    return check_after_init


def check(model_config: Any, families: Sequence[MoEFamily]) -> None:
    """Check an ``InferenceConfig`` against its own neuron config.

    Raises:
        ConfigurationError: The model could not run.
        IncompatibleUpstreamError: A seam that this model needs does not hold.
    """
    neuron_config = getattr(model_config, "neuron_config", None)
    family = flag.family_of_model(model_config, families)
    reads_moe_settings = family is not None and _reads_moe_settings(family)
    if not flag.is_on(neuron_config):
        flag.check_shared_scale(
            neuron_config, model_config, family, reads_moe_settings=reads_moe_settings
        )
        return
    flag.check_neuron_config(neuron_config)
    if family is None:
        flag.refuse_unsupported(neuron_config, model_config)
    elif flag.is_quantized(neuron_config):
        cores = frozenset() if runs_on_cpu(neuron_config) else _kernel_cores()
        upstream = flag.Upstream(reads_moe_settings, cores)
        flag.check_model(neuron_config, model_config, family, upstream)
        require(seams.needed_by_model(family))


def _reads_moe_settings(family: MoEFamily) -> bool:
    modeling = sys.modules.get(family.converter.partition(":")[0])
    initialize = getattr(modeling, "initialize_moe_module", None)
    return getattr(initialize, "__module__", _MOE_V2) == _MOE_V2


def _kernel_cores() -> frozenset[int]:
    """Numbers of logical cores for which this NxD has a blockwise kernel, asked of itself."""
    from neuronx_distributed.modules.moe import blockwise

    available = set()
    for cores in (1, 2):
        wanted = blockwise.KernelConfig(blockwise.LogicalNCConfig(cores), use_block_parallel=False)
        with contextlib.suppress(blockwise.KernelAvailabilityError):
            blockwise.check_kernel_availability(wanted)
            available.add(cores)
    return frozenset(available)


def quantized_dtype(neuron_config: Any) -> torch.dtype | None:
    """The dtype of quantized weights that a neuron config asks for, if it says so."""
    from neuronx_distributed.quantization.quantization_config import QuantizedDtype

    wanted = getattr(neuron_config, "quantization_dtype", None)
    dtype = QuantizedDtype.get_dtype(wanted) if isinstance(wanted, str) else wanted
    return getattr(dtype, "value", dtype)


def runs_on_cpu(neuron_config: Any) -> bool:
    """Whether upstream runs this model on a CPU (``neuronx_distributed.utils.cpu_mode``)."""
    return bool(getattr(neuron_config, "on_cpu", False)) or os.environ.get("NXD_CPU_MODE") == "1"


def _refuse_flag_without_seam(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # The flag comes this far only where MoENeuronConfig did not take it: upstream would ignore it
    # with a line in its log, and the experts would share a scale.
    if kwargs.get(flag.NAME) is True:
        require([seams.CONFIG])
        if _is_moe(instance):
            raise IncompatibleUpstreamError(
                f"{type(instance).__name__} does not hand its keywords to MoENeuronConfig, so "
                f"{flag.NAME}=True cannot reach it"
            )
    wrapped(*args, **kwargs)


def _is_moe(neuron_config: Any) -> bool:
    return any(parent.__name__ == "MoENeuronConfig" for parent in type(neuron_config).__mro__)
