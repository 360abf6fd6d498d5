"""The seam ``neuronx_distributed_inference.models.model_wrapper``: quantization in two passes.

NxDI converts a model's layers to quantized ones in one pass, with one type for all. Here the
experts get a pass of their own, and when the model is loaded they are looked at once more.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from nxdi_expertscale import flag
from nxdi_expertscale.activation import FEATURE, Patch, mentions, require
from nxdi_expertscale.errors import ConfigurationError, IncompatibleUpstreamError
from nxdi_expertscale.families import MoEFamily
from nxdi_expertscale.patches import config, seams

MODULE = "neuronx_distributed_inference.models.model_wrapper"

_logger = logging.getLogger("nxdi_expertscale")

_CARRIED_OVER = ("quantized_dtype", "activation_quantization_type", "clamp_bound")


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The two passes around ``convert``, and the checks around ``load_module``."""
    return [
        Patch(
            seam=seams.QUANTIZATION,
            module=MODULE,
            attribute="convert",
            wrapper=_converting(families),
            misfit=_convert_misfit,
            native=_is_native,
        ),
        Patch(
            seam=seams.LOAD_MODULE,
            module=MODULE,
            attribute="DecoderModelInstance.load_module",
            wrapper=_loading(families),
        ),
    ]


def _is_native(module: ModuleType) -> bool:
    instance = getattr(module, "DecoderModelInstance", None)
    return mentions(getattr(instance, "load_module", None), FEATURE)


def _convert_misfit(module: ModuleType) -> str | None:
    try:
        inspect.signature(module.convert).bind(
            None, q_config=None, inplace=True, mapping=None, modules_to_not_convert=None
        )
        inspect.signature(module.convert).bind(None, q_config=None, include=None)
    except TypeError as error:
        return f"convert is not called as NxD's is: {error}"
    instance = getattr(module, "DecoderModelInstance", None)
    if not mentions(getattr(instance, "load_module", None), "convert"):
        return "DecoderModelInstance.load_module does not call convert"
    return None


def _converting(families: Sequence[MoEFamily]) -> Callable[..., Any]:
    def convert(
        wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        model = call["module"]
        experts = expert_layers(model)
        # A call with an include list is not the one that NxDI makes.
        if not experts or call.get("include") is not None:
            return wrapped(*args, **kwargs)
        neuron_config = model.config.neuron_config
        family = _family_of(model, experts, families)
        if family is None:
            _refuse_unknown_family(neuron_config, model)
            return wrapped(*args, **kwargs)
        _check_dtype(neuron_config, call["q_config"])
        excluded = list(call.get("modules_to_not_convert") or ())
        kept = _kept_in_full_precision(experts, excluded, family)
        skipped = [*excluded, *_all_paths(model, kept), *family.full_precision]
        if not flag.is_on(neuron_config):
            return wrapped(**{**call, "modules_to_not_convert": skipped or None})
        quantized = _all_paths(model, [name for name in experts if name not in kept])
        return _convert_in_two_passes(wrapped, call, skipped, quantized)

    return convert


def _convert_in_two_passes(
    wrapped: Callable[..., Any],
    call: dict[str, Any],
    skipped: Sequence[str],
    quantized: Sequence[str],
) -> Any:
    """Convert everything but the experts as upstream asks, then the experts expert-wise."""
    q_config = call["q_config"]
    model = wrapped(**{**call, "modules_to_not_convert": [*skipped, *quantized]})
    if not quantized:
        return model
    return wrapped(
        model,
        q_config=expert_wise_q_config(q_config),
        inplace=True,
        mapping=call.get("mapping"),
        include=list(quantized),
    )


def expert_wise_q_config(q_config: dict[str, Any]) -> dict[str, Any]:
    """NxD's own expert-wise settings, with the dtype and bounds of the settings for the rest.

    Raises:
        ConfigurationError: The settings for the rest are not per-channel.
    """
    from neuronx_distributed.quantization.quantization_config import (
        get_default_expert_wise_per_channel_custom_qconfig_dict,
    )

    found = q_config["quantization_type"].value
    if found != flag.PER_CHANNEL:
        raise ConfigurationError(
            f"{flag.NAME}=True needs quantization_type={flag.PER_CHANNEL!r}, not {found!r}"
        )
    carried = {name: q_config[name] for name in _CARRIED_OVER if name in q_config}
    return {**get_default_expert_wise_per_channel_custom_qconfig_dict(), **carried}


def expert_layers(model: Any) -> list[str]:
    """Dotted paths of a model's fused expert layers that are not quantized yet."""
    from neuronx_distributed.modules.moe.moe_parallel_layers import ExpertFusedLinear

    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, ExpertFusedLinear) and not hasattr(module, "quantization_type")
    ]


def _all_paths(model: Any, names: Sequence[str]) -> list[str]:
    """Every dotted path at which the modules of these names stand.

    The fused token generation of NxD (``modules/moe/moe_fused_tkg.py``) holds the experts of the
    layer a second time, and NxD's ``convert`` walks along both paths.
    """
    wanted = {id(model.get_submodule(name)) for name in names}
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if id(module) in wanted]


def _check_dtype(neuron_config: Any, q_config: dict[str, Any]) -> None:
    """Make sure that NxDI makes layers of the dtype that the config names.

    Up to 0.6 its ``load_module`` knows ``f8e4m3`` alone, and takes int8 for every other name.

    Raises:
        ConfigurationError: It does not: the weights would be cast without their scales.
    """
    wanted = config.quantized_dtype(neuron_config)
    found = q_config["quantized_dtype"]
    found = getattr(found, "value", found)
    if wanted is not None and wanted != found:
        raise ConfigurationError(
            f"quantization_dtype={neuron_config.quantization_dtype!r}: this release of NxDI makes "
            f"{found} layers of it; use quantization_dtype='f8e4m3' or 'int8'"
        )


def _kept_in_full_precision(
    experts: Sequence[str], excluded: Sequence[str], family: MoEFamily
) -> list[str]:
    """The expert layers that exclusions name, on the checkpoint's side or on the module's."""
    return [name for name in experts if _is_excluded(name, excluded, family)]


def _is_excluded(name: str, excluded: Sequence[str], family: MoEFamily) -> bool:
    layer = family.layer_of_module(name)
    return layer is not None and family.excludes_experts(layer, excluded)


def _family_of(
    model: Any, experts: Sequence[str], families: Sequence[MoEFamily]
) -> MoEFamily | None:
    family = flag.family_of_model(model.config, families)
    if family is None or any(family.layer_of_module(name) is None for name in experts):
        return None
    return family


def _refuse_unknown_family(neuron_config: Any, model: Any) -> None:
    if flag.is_on(neuron_config):
        model_type = getattr(model.config, "model_type", type(model.config).__name__)
        raise ConfigurationError(
            f"{flag.NAME}=True is not supported for this model ({model_type!r}): no plugin "
            "declares its family; turn the flag off, or add a plugin for it"
        )


def _loading(families: Sequence[MoEFamily]) -> Callable[..., Any]:
    def load_module(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Once more: a config may have been changed since it was made.
        config.check(instance.config, families)
        result = wrapped(*args, **kwargs)
        for model in _models_of(instance):
            _check_loaded(model, families)
        return result

    return load_module


def _models_of(instance: Any) -> list[Any]:
    if instance.neuron_config.enable_fused_speculation:
        return [instance.module.draft_model, instance.module.target_model]
    return [instance.module]


def _check_loaded(model: Any, families: Sequence[MoEFamily]) -> None:
    """Make sure that the experts of a loaded model are what its config asks for.

    Raises:
        ConfigurationError: An exclusion reaches the module by chance, and not the checkpoint.
        IncompatibleUpstreamError: NxDI did not convert them through the seam that is patched.
    """
    from neuronx_distributed.modules.moe.moe_parallel_layers import ExpertFusedLinear

    neuron_config = model.config.neuron_config
    family = flag.family_of_model(model.config, families)
    if not flag.is_quantized(neuron_config) or family is None:
        return
    excluded = flag.exclusions(neuron_config)
    for name, module in model.named_modules():
        if not isinstance(module, ExpertFusedLinear):
            continue
        found = getattr(getattr(module, "quantization_type", None), "value", None)
        if _is_excluded(name, excluded, family):
            expected = None
        else:
            expected = flag.EXPERT_WISE if flag.is_on(neuron_config) else found or "quantized"
        if found == expected:
            continue
        if flag.is_on(neuron_config):
            require([seams.QUANTIZATION])
            raise IncompatibleUpstreamError(
                f"{flag.NAME}=True, and NxDI made {name} {found or 'unquantized'}: this release "
                "does not quantize through the function that is patched"
            )
        raise ConfigurationError(
            f"modules_to_not_convert: NxDI left {name} unquantized, because one of "
            f"{list(excluded)} is a part of its name, and its weights in the checkpoint are not "
            "excluded; name the modules more fully"
        )
