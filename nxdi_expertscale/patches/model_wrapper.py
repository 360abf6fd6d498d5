"""The seam ``neuronx_distributed_inference.models.model_wrapper``: quantization in two passes.

NxDI converts a model's layers to quantized ones in one pass, with one type for all. Here the
experts get a pass of their own, and when the model is loaded they are looked at once more.
"""

from __future__ import annotations

import importlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from nxdi_expertscale.errors import ConfigurationError, IncompatibleUpstreamError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.exclusions import are_experts_excluded
from nxdi_expertscale.hooking.code import refers_to
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import config, installed_release, seams
from nxdi_expertscale.settings import flag

MODULE = "neuronx_distributed_inference.models.model_wrapper"

_PARAMETERS = ("q_config", "inplace", "mapping", "include", "modules_to_not_convert")
_EXPERT_WISE_SETTINGS = "get_default_expert_wise_per_channel_custom_qconfig_dict"
_CARRIED_OVER = ("quantized_dtype", "activation_quantization_type", "clamp_bound")


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The two passes around ``convert``, and the checks around ``load_module``."""
    return [
        Patch(
            seam=seams.QUANTIZATION,
            module=MODULE,
            attribute="convert",
            wrapper=_converting(families),
            find_incompatibility=_convert_incompatibility,
            is_native=_is_native,
        ),
        Patch(
            seam=seams.LOAD_MODULE,
            module=MODULE,
            attribute="DecoderModelInstance.load_module",
            wrapper=_loading(families),
            is_native=_is_native,
        ),
    ]


def _is_native(module: ModuleType) -> bool:
    instance = getattr(module, "DecoderModelInstance", None)
    return refers_to(getattr(instance, "load_module", None), flag.NAME)


def _convert_incompatibility(module: ModuleType) -> str | None:
    parameters = inspect.signature(module.convert).parameters
    missing = [name for name in _PARAMETERS if name not in parameters]
    if missing:
        return f"convert has no parameter {missing[0]!r}"
    instance = getattr(module, "DecoderModelInstance", None)
    if not refers_to(getattr(instance, "load_module", None), "convert"):
        return "DecoderModelInstance.load_module does not call convert"
    if not hasattr(quantization_config(), _EXPERT_WISE_SETTINGS):
        return f"NxD has no {_EXPERT_WISE_SETTINGS}"
    return None


def quantization_config() -> ModuleType:
    """NxD's module of quantization settings."""
    return importlib.import_module("neuronx_distributed.quantization.quantization_config")


def _converting(families: Sequence[MoEFamily]) -> Callable[..., Any]:
    def convert(
        wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = inspect.signature(wrapped).bind(*args, **kwargs)
        model = call.args[0]
        experts = [
            name for name, layer in expert_layers(model).items() if not _quantization_type(layer)
        ]
        neuron_config = getattr(getattr(model, "config", None), "neuron_config", None)
        # NxDI gives its settings, and never an include list.
        is_nxdis = (
            call.arguments.get("include") is None and call.arguments.get("q_config") is not None
        )
        if not experts or neuron_config is None or not is_nxdis:
            return wrapped(*args, **kwargs)
        family = flag.family_of_model(model.config, families)
        if family is None:
            _refuse_unknown_family(neuron_config, model)
            return wrapped(*args, **kwargs)
        strange = [name for name in experts if family.names.layer_of_module(name) is None]
        needed = seams.needed_by_model(family)
        if flag.is_on(neuron_config):
            seams.require_seams(needed, load=True)
            if strange:
                raise _not_as_known(f"{strange[0]} is not one of {family.expert_mlps}")
        elif strange or engine.find_failed_seam(needed, load=True) is not None:
            return wrapped(*args, **kwargs)
        _check_dtype(neuron_config, call.arguments["q_config"])
        excluded = list(call.arguments.get("modules_to_not_convert") or ())
        kept = _kept_in_full_precision(experts, excluded, family)
        skipped = [*excluded, *_all_paths(model, kept), *family.full_precision]
        if not flag.is_on(neuron_config):
            return _call(wrapped, call, modules_to_not_convert=skipped or None)
        _refuse_second_experts_at_two_paths(model, experts)
        quantized = _all_paths(model, [name for name in experts if name not in kept])
        return _convert_in_two_passes(wrapped, call, skipped, quantized)

    return convert


def _call(wrapped: Callable[..., Any], call: inspect.BoundArguments, **changes: Any) -> Any:
    """Call a function with the arguments of another call, but for some."""
    changed = inspect.BoundArguments(call.signature, OrderedDict(call.arguments, **changes))
    return wrapped(*changed.args, **changed.kwargs)


def _convert_in_two_passes(
    wrapped: Callable[..., Any],
    call: inspect.BoundArguments,
    skipped: Sequence[str],
    quantized: Sequence[str],
) -> Any:
    """Convert everything but the experts as upstream asks, then the experts expert-wise."""
    model = _call(wrapped, call, modules_to_not_convert=[*skipped, *quantized])
    if not quantized:
        return model
    return wrapped(
        model,
        q_config=expert_wise_q_config(call.arguments["q_config"]),
        inplace=True,
        mapping=call.arguments.get("mapping"),
        include=list(quantized),
    )


def expert_wise_q_config(q_config: dict[str, Any]) -> dict[str, Any]:
    """NxD's own expert-wise settings, with the dtype and bounds of the settings for the rest.

    Raises:
        ConfigurationError: The settings for the rest are not per-channel.
    """
    found = q_config.get("quantization_type")
    found = getattr(found, "value", found)
    if found != flag.PER_CHANNEL:
        raise ConfigurationError(
            f"{flag.NAME}=True needs quantization_type={flag.PER_CHANNEL!r}, not {found!r}"
        )
    carried = {name: q_config[name] for name in _CARRIED_OVER if name in q_config}
    return {**getattr(quantization_config(), _EXPERT_WISE_SETTINGS)(), **carried}


def expert_layers(model: Any) -> dict[str, Any]:
    """A model's fused expert layers, quantized or not, by their dotted paths."""
    return {
        name: module
        for name, module in model.named_modules()
        # By its name, wherever this release keeps it.
        if any(parent.__name__ == "ExpertFusedLinear" for parent in type(module).__mro__)
    }


def _all_paths(model: Any, names: Sequence[str]) -> list[str]:
    """Every dotted path at which the modules of these names stand.

    The fused token generation of NxD (``modules/moe/moe_fused_tkg.py``) holds the experts of the
    layer a second time, and NxD's ``convert`` walks along both paths.
    """
    wanted = {id(model.get_submodule(name)) for name in names}
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if id(module) in wanted]


def _refuse_second_experts_at_two_paths(model: Any, experts: Sequence[str]) -> None:
    """Make sure that hybrid sharding and fused token generation do not meet.

    NxD's fused token generation has the experts at a second path, at which nothing is to be loaded.
    It says so to ``mlp_op`` (``modules/moe/moe_fused_tkg.py``, the hook after quantization), and
    not to hybrid sharding's ``mlp_op_tkg``, which it does not compute with either.

    Raises:
        ConfigurationError: They do: NxD could not load the model.
    """
    second = [name for name in experts if ".mlp_op_tkg." in name]
    if len(_all_paths(model, second)) > len(second):
        raise ConfigurationError(
            "hybrid_sharding_config: NxD cannot load quantized experts both for hybrid sharding "
            f"and for fused token generation, and this model has {second[0]} for both; remove "
            "hybrid_sharding_config, or moe_fused_nki_kernel_enabled where it is set"
        )


def _check_dtype(neuron_config: Any, q_config: dict[str, Any]) -> None:
    """Make sure that NxDI makes layers of the dtype that the config names.

    Up to 0.6 its ``load_module`` knows ``f8e4m3`` alone, and takes int8 for every other name.

    Raises:
        ConfigurationError: It does not: the weights would be cast without their scales.
    """
    wanted = installed_release.quantized_dtype(neuron_config)
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
    layer = family.names.layer_of_module(name)
    return layer is not None and are_experts_excluded(layer, excluded, family)


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
    """The model that was loaded, or the draft and the target of fused speculation."""
    loaded = getattr(instance, "module", None)
    pair = [getattr(loaded, name, None) for name in ("draft_model", "target_model")]
    return [model for model in pair if model is not None] or [loaded]


def _check_loaded(model: Any, families: Sequence[MoEFamily]) -> None:
    """Make sure that the experts of a loaded model are what its config asks for.

    Raises:
        ConfigurationError: An exclusion reaches the module by chance, and not the checkpoint.
        IncompatibleUpstreamError: NxDI did not convert them through the seam that is patched.
    """
    model_config = getattr(model, "config", None)
    neuron_config = getattr(model_config, "neuron_config", None)
    family = flag.family_of_model(model_config, families)
    if not flag.is_quantized(neuron_config) or family is None:
        return
    excluded = flag.exclusions(neuron_config)
    layers = expert_layers(model)
    if flag.is_on(neuron_config):
        _check_expert_wise(layers, excluded, family)
    elif engine.find_failed_seam(seams.needed_by_model(family)) is None:
        _check_exclusions(layers, excluded, family)


def _check_exclusions(
    layers: Mapping[str, Any], excluded: Sequence[str], family: MoEFamily
) -> None:
    for name, layer in layers.items():
        known = family.names.layer_of_module(name) is not None
        if known and not _quantization_type(layer) and not _is_excluded(name, excluded, family):
            raise ConfigurationError(
                f"modules_to_not_convert: NxDI left {name} unquantized, because one of "
                f"{list(excluded)} is a part of its name, and its weights in the checkpoint are "
                "not excluded; name the modules more fully"
            )


def _check_expert_wise(
    layers: Mapping[str, Any], excluded: Sequence[str], family: MoEFamily
) -> None:
    for name, layer in layers.items():
        found = _quantization_type(layer)
        wanted = "" if _is_excluded(name, excluded, family) else flag.EXPERT_WISE
        if found != wanted:
            raise _not_as_known(
                f"{name} is {found or 'not quantized'}, and {wanted or 'full precision'} was "
                "asked for; it was not converted through the function that is patched"
            )
        scale = getattr(layer, "scale", None)
        shape = tuple(getattr(scale, "shape", ()))
        if wanted and (len(shape) != 3 or shape[:2] != (layer.weight.shape[0], 1)):
            raise _not_as_known(f"{name} has no scale of shape [E, 1, dim], but {shape or scale}")
    numbers = (family.names.layer_of_module(name) for name in layers)
    expected = [
        family.fused_key(number, fused).removesuffix(".weight")
        for number in numbers
        if number is not None
        for fused in family.fused
    ]
    missing = [name for name in expected or ["the experts of any layer"] if name not in layers]
    if missing:
        raise _not_as_known(f"the model has no module for {missing[0]}, but {list(layers)[:2]}")


def _not_as_known(difference: str) -> IncompatibleUpstreamError:
    return IncompatibleUpstreamError(
        f"{flag.NAME}=True cannot work with this NxDI: seam {seams.QUANTIZATION!r}: {difference}. "
        f"Turn {flag.NAME} off, or install a release that is supported"
    )


def _quantization_type(layer: Any) -> str:
    """The type that a layer is quantized in; empty if it is not quantized."""
    found = getattr(layer, "quantization_type", "")
    return str(getattr(found, "value", found))
