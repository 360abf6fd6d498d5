"""NxDI's ``DecoderModelInstance``: a look at each model that it has built."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import installed_release, model_wrapper, required_seams, seams
from nxdi_expertscale.settings.settings import read_settings


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """The checks around ``load_module``, and the states that ``get`` tells NxD of."""
    return [
        Patch(
            seam=seams.LOAD_MODULE,
            module=model_wrapper.MODULE,
            attribute="DecoderModelInstance.load_module",
            wrapper=_loading(families),
            is_native=model_wrapper.is_native,
        ),
        Patch(
            seam=seams.ALIASES,
            module=model_wrapper.MODULE,
            attribute="DecoderModelInstance.get",
            wrapper=_remember_states,
        ),
    ]


def _loading(families: Sequence[MoEFamily]) -> Callable[..., Any]:
    def load_module(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Once more: a config may have been changed since it was made.
        installed_release.checked_settings(instance.config, families, is_built=True)
        result = wrapped(*args, **kwargs)
        for model in models_in(getattr(instance, "module", None)):
            _check_loaded(model, families)
        return result

    return load_module


def models_in(module: Any) -> list[Any]:
    """The model itself, or the draft and the target of fused speculation."""
    pair = [getattr(module, name, None) for name in ("draft_model", "target_model")]
    return [model for model in pair if model is not None] or [module]


_aliases: WeakKeyDictionary[Any, Mapping[Any, int]] = WeakKeyDictionary()


def _remember_states(
    wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    module, aliases = wrapped(*args, **kwargs)
    # The dictionary itself, to which the method of a subclass adds.
    _aliases[module] = aliases
    return module, aliases


def states_of(module: Any) -> Collection[Any]:
    """The parameters that a model writes itself, as far as ``get`` has told NxD (its aliases)."""
    return tuple(_aliases.get(module, ()))


def _check_loaded(model: Any, families: Sequence[MoEFamily]) -> None:
    from nxdi_expertscale.loading import loaded_experts
    from nxdi_expertscale.loading.passes import find_expert_layers

    model_config = getattr(model, "config", None)
    settings = read_settings(getattr(model_config, "neuron_config", None), model_config, families)
    family, excluded = settings.family, settings.exclusions
    if settings.is_on and settings.is_quantized and family is not None:
        with required_seams.layout_errors(seams.QUANTIZATION, family):
            loaded_experts.check_expert_wise(find_expert_layers(model), excluded, family)
