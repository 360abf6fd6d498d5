"""The seam ``neuronx_distributed_inference.models.config``: the flag, and its early checks."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import required_seams, seams
from nxdi_expertscale.patches.installed_release import checked_settings
from nxdi_expertscale.settings import device_variables, rules
from nxdi_expertscale.settings.settings import FLAG, read_settings

MODULE = "neuronx_distributed_inference.models.config"

Wrapped = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The flag on ``MoENeuronConfig``, and the checks of a model."""

    def check_after_init(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
        wrapped(*args, **kwargs)
        rules.warn(checked_settings(instance, families))

    return [
        Patch(
            seam=seams.CONFIG,
            module=MODULE,
            attribute="MoENeuronConfig.__init__",
            wrapper=_accept_flag,
            find_incompatibility=_incompatibility,
            is_native=_is_native,
        ),
        Patch(
            seam=seams.INFERENCE_CONFIG,
            module=MODULE,
            attribute="InferenceConfig.__init__",
            wrapper=check_after_init,
            find_incompatibility=_inference_config_incompatibility,
            is_native=_is_native,
        ),
        Patch(
            seam=seams.FLAG_GUARD,
            module=MODULE,
            attribute="NeuronConfig.__init__",
            wrapper=_keep_flag_of_another_config,
        ),
    ]


def _is_native(module: ModuleType) -> bool:
    return refers_to(module.MoENeuronConfig.__init__, FLAG)


def _incompatibility(module: ModuleType) -> str | None:
    has_attributes = module.MoENeuronConfig.__dictoffset__
    return None if has_attributes else "the attributes of a MoENeuronConfig are fixed"


def _inference_config_incompatibility(module: ModuleType) -> str | None:
    takes = "neuron_config" in inspect.signature(module.InferenceConfig.__init__).parameters
    return None if takes else "InferenceConfig.__init__ takes no neuron_config"


def _accept_flag(wrapped: Wrapped, instance: Any, args: Args, kwargs: Kwargs) -> None:
    value = kwargs.pop(FLAG, False)
    if value is True:
        required_seams.require_seams(seams.needed_by_config())
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
        required_seams.require_seams(seams.needed_by_config())
    if FLAG in kwargs:
        vars(instance)[FLAG] = kwargs[FLAG]
        rules.check(read_settings(instance))
    wrapped(*args, **kwargs)
