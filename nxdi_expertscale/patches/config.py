"""The seam ``neuronx_distributed_inference.models.config``: the flag, and its early checks."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import seams
from nxdi_expertscale.settings import device_variables, flag

if TYPE_CHECKING:
    import torch

MODULE = "neuronx_distributed_inference.models.config"

_MOE_V2 = "neuronx_distributed_inference.modules.moe_v2"
"""Where a family's experts are built from the neuron config's own settings for them."""


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The flag on ``MoENeuronConfig``, its way to JSON and back, and the checks of a model."""
    return [
        Patch(
            seam=seams.CONFIG,
            module=MODULE,
            attribute="MoENeuronConfig.__init__",
            wrapper=_accept_flag,
            find_incompatibility=_config_incompatibility,
            is_native=_is_native,
        ),
        Patch(
            seam=seams.INFERENCE_CONFIG,
            module=MODULE,
            attribute="InferenceConfig.__init__",
            wrapper=_checking_model(families),
            find_incompatibility=_inference_config_incompatibility,
            is_native=_is_native,
        ),
        Patch(
            seam=seams.CONFIG_TO_JSON,
            module=MODULE,
            attribute="InferenceConfig.to_json_string",
            wrapper=_check_written,
        ),
        Patch(
            seam=seams.CONFIG_FROM_JSON,
            module=MODULE,
            attribute="InferenceConfig.from_json_string",
            wrapper=_check_read,
        ),
        Patch(
            seam=seams.FLAG_GUARD,
            module=MODULE,
            attribute="NeuronConfig.__init__",
            wrapper=_note_flag_on_its_way,
        ),
    ]


def _is_native(module: ModuleType) -> bool:
    return refers_to(module.MoENeuronConfig.__init__, flag.NAME)


def _config_incompatibility(module: ModuleType) -> str | None:
    if not module.MoENeuronConfig.__dictoffset__:
        return "the attributes of a MoENeuronConfig are fixed"
    return None


def _inference_config_incompatibility(module: ModuleType) -> str | None:
    if "neuron_config" not in inspect.signature(module.InferenceConfig.__init__).parameters:
        return "InferenceConfig.__init__ takes no neuron_config"
    return None


def _accept_flag(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    value = flag.parse(kwargs.pop(flag.NAME, False))
    if value:
        seams.require_seams(seams.needed_by_config())
    wrapped(*args, **kwargs)
    # An attribute of the config, so that upstream writes it to JSON and copies it.
    vars(instance)[flag.NAME] = value
    flag.check_neuron_config(instance)
    flag.warn_if_without_effect(instance)
    if value and flag.is_quantized(instance) and flag.is_fp8(instance):
        device_variables.turn_on()


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
    if family is not None:
        flag.check_cast(neuron_config)
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
        seams.require_seams(seams.needed_by_model(family), load=True)


def _check_written(
    wrapped: Callable[..., str], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    text = wrapped(*args, **kwargs)
    if flag.is_on(getattr(instance, "neuron_config", None)) and not _flag_in(text):
        raise IncompatibleUpstreamError(
            f"seam {seams.CONFIG_TO_JSON!r}: InferenceConfig.to_json_string left {flag.NAME}=True "
            "out; a compiled model would be loaded without it"
        )
    return text


def _check_read(
    wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    config = wrapped(*args, **kwargs)
    text = inspect.signature(wrapped).bind(*args, **kwargs).args[0]
    overridden = "neuron_config" in kwargs
    if _flag_in(text) and not overridden and not flag.is_on(getattr(config, "neuron_config", None)):
        raise IncompatibleUpstreamError(
            f"seam {seams.CONFIG_FROM_JSON!r}: InferenceConfig.from_json_string left "
            f"{flag.NAME}=true out of what it read"
        )
    return config


def _flag_in(text: str) -> bool:
    """Whether the flag is on in a config's JSON."""
    neuron_config = json.loads(text).get("neuron_config")
    return isinstance(neuron_config, dict) and neuron_config.get(flag.NAME) is True


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


def _note_flag_on_its_way(
    wrapped: Callable[..., None], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # The flag comes this far only where no MoENeuronConfig has taken it: NxDI would ignore it
    # with a line in its log, and the experts of an MoE would share a scale.
    if kwargs.get(flag.NAME) is True:
        seams.require_seams(seams.needed_by_config())
        vars(instance)[flag.NAME] = True
    wrapped(*args, **kwargs)
