"""The seam ``neuronx_distributed_inference.models.config``: the flag, and its early checks."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from nxdi_expertscale.errors import IncompatibleUpstreamError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import installed_release, seams
from nxdi_expertscale.settings import compiled_config, device_variables, rules
from nxdi_expertscale.settings.settings import FLAG, Settings, read_settings

MODULE = "neuronx_distributed_inference.models.config"

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The flag on ``MoENeuronConfig``, its way to JSON and back, and the checks of a model."""

    def check_after_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
        wrapped(*args, **kwargs)
        rules.warn(checked_settings(instance, families))

    def patch(seam: str, attribute: str, wrapper: Wrapped, **checks: Any) -> Patch:
        return Patch(seam=seam, module=MODULE, attribute=attribute, wrapper=wrapper, **checks)

    return [
        patch(
            seams.CONFIG,
            "MoENeuronConfig.__init__",
            _accept_flag,
            find_incompatibility=_config_incompatibility,
            is_native=_is_native,
        ),
        patch(
            seams.INFERENCE_CONFIG,
            "InferenceConfig.__init__",
            check_after_init,
            find_incompatibility=_inference_config_incompatibility,
            is_native=_is_native,
        ),
        patch(seams.CONFIG_TO_JSON, "InferenceConfig.to_json_string", _check_written),
        patch(seams.CONFIG_FROM_JSON, "InferenceConfig.from_json_string", _check_read),
        patch(seams.FLAG_GUARD, "NeuronConfig.__init__", _keep_flag_of_another_config),
    ]


def checked_settings(
    model_config: Any, families: Sequence[MoEFamily], family: MoEFamily | None = None
) -> Settings:
    """Read and check an ``InferenceConfig`` and its neuron config.

    To be called wherever the flag counts: a config may have been changed since it was made.

    Args:
        model_config: The ``InferenceConfig``.
        families: The families that are in force.
        family: The model's family where it is known by other means than its config.

    Raises:
        ConfigurationError: The model could not run.
        IncompatibleUpstreamError: A seam that this model needs does not hold.
    """
    neuron_config = getattr(model_config, "neuron_config", None)
    settings = read_settings(neuron_config, model_config, families, family)
    upstream = installed_release.upstream_of(settings, neuron_config)
    settings = dataclasses.replace(settings, upstream=upstream)
    rules.check(settings)
    if settings.is_on and settings.is_quantized and settings.family is not None:
        seams.require_seams(seams.needed_by_model(settings.family), load=True)
    return settings


def _is_native(module: ModuleType) -> bool:
    return refers_to(module.MoENeuronConfig.__init__, FLAG)


def _config_incompatibility(module: ModuleType) -> str | None:
    has_attributes = module.MoENeuronConfig.__dictoffset__
    return None if has_attributes else "the attributes of a MoENeuronConfig are fixed"


def _inference_config_incompatibility(module: ModuleType) -> str | None:
    takes = "neuron_config" in inspect.signature(module.InferenceConfig.__init__).parameters
    return None if takes else "InferenceConfig.__init__ takes no neuron_config"


def _accept_flag(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    value = kwargs.pop(FLAG, False)
    if value is True:
        seams.require_seams(seams.needed_by_config())
    wrapped(*args, **kwargs)
    # An attribute of the config, so that upstream writes it to JSON and copies it.
    vars(instance)[FLAG] = value
    path = getattr(instance, "quantized_checkpoints_path", None)
    if isinstance(path, str):
        # NxDI would make a folder that is named "~".
        instance.quantized_checkpoints_path = os.path.expanduser(path)  # noqa: PTH111
    settings = read_settings(instance)
    rules.check(settings)
    rules.warn(settings)
    if settings.is_on and settings.is_quantized and settings.is_fp8:
        device_variables.set_variables()


def _keep_flag_of_another_config(
    wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs
) -> None:
    # The flag comes this far only where no MoENeuronConfig has taken it: NxDI would ignore it
    # with a line in its log, and the experts of an MoE would share a scale.
    if kwargs.get(FLAG) is True:
        seams.require_seams(seams.needed_by_config())
    if FLAG in kwargs:
        vars(instance)[FLAG] = kwargs[FLAG]
        rules.check(read_settings(instance))
    wrapped(*args, **kwargs)


def _check_written(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> str:
    text: str = wrapped(*args, **kwargs)
    settings = read_settings(getattr(instance, "neuron_config", None))
    if settings.is_on and not compiled_config.is_on_in(text):
        raise IncompatibleUpstreamError(
            f"seam {seams.CONFIG_TO_JSON!r}: InferenceConfig.to_json_string left {FLAG}=True out; "
            "a compiled model would be loaded without it"
        )
    return text


def _check_read(wrapped: Wrapped, _: Any, args: Args, kwargs: Kwargs) -> Any:
    config = wrapped(*args, **kwargs)
    text = inspect.signature(wrapped).bind(*args, **kwargs).args[0]
    is_lost = compiled_config.is_on_in(text) and "neuron_config" not in kwargs
    if is_lost and not read_settings(getattr(config, "neuron_config", None)).is_on:
        raise IncompatibleUpstreamError(
            f"seam {seams.CONFIG_FROM_JSON!r}: InferenceConfig.from_json_string left {FLAG}=true "
            "out of what it read"
        )
    return config
