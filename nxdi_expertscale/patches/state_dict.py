"""The seam where NxDI fuses a family's experts: ``convert_…_to_neuron_state_dict``.

Upstream fuses the weights and knows nothing of scales. Around it, the scales are taken out, and
put in again fused as the weights are.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.hooking.code import names_in_code, refers_to
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import required_seams, seams
from nxdi_expertscale.patches.exclusions import exclusions_for_upstream
from nxdi_expertscale.patches.installed_release import checked_settings, quantized_dtype
from nxdi_expertscale.settings.settings import FLAG

if TYPE_CHECKING:
    import torch

_ENTRANCE = "convert_hf_to_neuron_state_dict"
"""The static method by which NxDI calls a model's converter, or which is it."""

_logger = logging.getLogger("nxdi_expertscale")


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """One patch for each family's converter."""
    return [_patch(family) for family in families]


def _patch(family: MoEFamily) -> Patch:
    return Patch(
        seam=seams.state_dict(family),
        module=family.module,
        attribute=family.function,
        wrapper=_fusing_scales(family),
        find_incompatibility=lambda module: _incompatibility(module, family),
        is_native=lambda module: refers_to(attrgetter(family.function)(module), FLAG),
    )


def _incompatibility(module: ModuleType, family: MoEFamily) -> str | None:
    converter = family.function
    function = attrgetter(converter)(module)
    parameters = list(inspect.signature(function).parameters)
    if "state_dict" not in parameters[0] or parameters[1:2] not in (["config"], ["cfg"]):
        return f"{converter} is not called with (state dict, config), but with {parameters}"
    if converter.endswith(f".{_ENTRANCE}"):
        return None
    callers = [
        method
        for owner in vars(module).values()
        if isinstance(owner, type) and owner.__module__ == module.__name__
        for method in (owner.__dict__.get(_ENTRANCE),)
        if method is not None
    ]
    if not callers or not all(refers_to(caller, converter) for caller in callers):
        return f"{_ENTRANCE} of {module.__name__} does not call {converter}"
    if family.converter_knows_scales:
        return None
    for part in (function, *callers):
        scales = sorted(word for word in names_in_code(part) if "scale" in word)
        if scales:
            return f"{part.__qualname__} treats scales itself ({scales[0]!r})"
    return None


def _fusing_scales(family: MoEFamily) -> Callable[..., Any]:
    def convert(
        wrapped: Callable[..., dict[str, torch.Tensor]],
        _: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        from nxdi_expertscale.checkpoint.finished import checked_tensors
        from nxdi_expertscale.loading import conversion
        from nxdi_expertscale.loading.put_off import convert_in_one_pass
        from nxdi_expertscale.loading.report import report_experts

        state_dict, config, *_rest = inspect.signature(wrapped).bind(*args, **kwargs).args
        run = partial(convert_in_one_pass, partial(wrapped, *args, **kwargs), state_dict, family)
        neuron_config = getattr(config, "neuron_config", None)
        settings = checked_settings(config, (), family)
        if not settings.is_quantized:
            return run()
        if not settings.is_on:
            reason = engine.find_failed_seam(seams.needed_by_model(family), load=True)
            if reason is not None:
                _logger.warning("the experts' scales are left to NxDI: %s", reason)
                return run()
        with required_seams.layout_errors(seams.state_dict(family), family):
            conversion.name_for_modules(state_dict, family)
            layers = conversion.take_out_scales(
                state_dict,
                family,
                settings,
                quantized_dtype=quantized_dtype(neuron_config),
                checked_tensors=checked_tensors(settings.quantized_checkpoints_path),
            )
        names = conversion.names_for_converter(settings, family, state_dict)
        with exclusions_for_upstream(neuron_config, names):
            converted: dict[str, torch.Tensor] = run(conversion.samplers(layers))
        with required_seams.layout_errors(seams.state_dict(family), family):
            conversion.put_in_scales(converted, layers, family, settings)
        folder, expert_wise = settings.quantized_checkpoints_path, settings.keeps_scales_apart
        report_experts(layers, folder, expert_wise=expert_wise)
        return converted

    return convert
