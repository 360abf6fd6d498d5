"""The seam ``neuronx_distributed_inference.models.model_wrapper``: quantization in two passes.

NxDI converts a model's layers to quantized ones in one pass, with one type for all. Here the
experts get a pass of their own.
"""

from __future__ import annotations

import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import installed_release, required_seams, seams
from nxdi_expertscale.patches.installed_release import checked_settings
from nxdi_expertscale.settings.settings import FLAG, Settings

if TYPE_CHECKING:
    from nxdi_expertscale.loading.passes import ExpertLayer, Passes

MODULE = "neuronx_distributed_inference.models.model_wrapper"

_PARAMETERS = ("q_config", "inplace", "mapping", "include", "modules_to_not_convert")
_EXPERT_WISE_SETTINGS = "get_default_expert_wise_per_channel_custom_qconfig_dict"


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The two passes around ``convert``."""
    return [
        Patch(
            seam=seams.QUANTIZATION,
            module=MODULE,
            attribute="convert",
            wrapper=_converting(families),
            find_incompatibility=_incompatibility,
            is_native=is_native,
        )
    ]


def is_native(module: ModuleType) -> bool:
    """Whether NxDI itself converts the experts with scales of their own."""
    instance = getattr(module, "DecoderModelInstance", None)
    return refers_to(getattr(instance, "load_module", None), FLAG)


def _incompatibility(module: ModuleType) -> str | None:
    parameters = inspect.signature(module.convert).parameters
    missing = [name for name in _PARAMETERS if name not in parameters]
    if missing:
        return f"convert has no parameter {missing[0]!r}"
    instance = getattr(module, "DecoderModelInstance", None)
    if not refers_to(getattr(instance, "load_module", None), "convert"):
        return "DecoderModelInstance.load_module does not call convert"
    if not hasattr(_quantization_config(), _EXPERT_WISE_SETTINGS):
        return f"NxD has no {_EXPERT_WISE_SETTINGS}"
    return None


def _quantization_config() -> ModuleType:
    return importlib.import_module("neuronx_distributed.quantization.quantization_config")


def _converting(families: Sequence[MoEFamily]) -> Callable[..., Any]:
    def convert(
        wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        from nxdi_expertscale.loading import passes

        call = inspect.signature(wrapped).bind(*args, **kwargs)
        model, q_config = call.args[0], call.arguments.get("q_config")
        model_config = getattr(model, "config", None)
        neuron_config = getattr(model_config, "neuron_config", None)
        layers = [layer for layer in passes.find_expert_layers(model) if not layer.is_quantized]
        # NxDI gives its settings, and never an include list.
        is_nxdis = neuron_config is not None and call.arguments.get("include") is None
        if not layers or q_config is None or not is_nxdis:
            return wrapped(*args, **kwargs)
        settings = checked_settings(model_config, families, is_built=True)
        family = _select_family(layers, settings)
        if family is None:
            return wrapped(*args, **kwargs)
        wanted = installed_release.quantized_dtype(neuron_config)
        passes.check_quantized_dtype(wanted, q_config, settings.quantization_dtype)
        names = call.arguments.get("modules_to_not_convert") or ()
        modules = passes.find_excluded_modules(model, names, family)
        plan = passes.plan_passes(layers, modules, names, family, expert_wise=settings.is_on)
        return _convert(wrapped, call, plan)

    return convert


def _select_family(layers: Sequence[ExpertLayer], settings: Settings) -> MoEFamily | None:
    """The family by which a model's experts are converted; None where NxDI is left alone."""
    from nxdi_expertscale.loading import passes

    with required_seams.layout_errors(seams.QUANTIZATION, settings.family):
        family = passes.find_family(layers, settings)
    if family is None or settings.is_on:
        return family
    needed = seams.needed_by_model(family)
    failure = engine.find_failed_seam(needed, load=True, may_wait=False)
    return family if failure is None else None


def _convert(wrapped: Callable[..., Any], call: inspect.BoundArguments, plan: Passes) -> Any:
    """Convert everything but the experts as upstream asks, then the experts expert-wise."""
    from nxdi_expertscale.loading.passes import expert_wise_q_config

    first = OrderedDict(call.arguments, modules_to_not_convert=list(plan.skipped) or None)
    changed = inspect.BoundArguments(call.signature, first)
    model = wrapped(*changed.args, **changed.kwargs)
    if not plan.expert_wise:
        return model
    defaults = getattr(_quantization_config(), _EXPERT_WISE_SETTINGS)()
    return wrapped(
        model,
        q_config=expert_wise_q_config(call.arguments["q_config"], defaults),
        inplace=True,
        mapping=call.arguments.get("mapping"),
        include=list(plan.expert_wise),
    )
