"""The seam where NxDI fuses a family's experts: ``convert_…_to_neuron_state_dict``.

Upstream fuses the weights and knows nothing of scales. Around it, the scales are taken out, and
put in again fused as the weights are.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.errors import CheckpointError, ConfigurationError, IncompatibleUpstreamError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.exclusions import are_experts_excluded
from nxdi_expertscale.hooking.code import names_in_code, refers_to
from nxdi_expertscale.hooking.engine import engine
from nxdi_expertscale.hooking.patch import Patch
from nxdi_expertscale.patches import seams
from nxdi_expertscale.patches.installed_release import quantized_dtype
from nxdi_expertscale.settings import flag

if TYPE_CHECKING:
    import torch

    from nxdi_expertscale.loading.expert_scales import LayerScales

_ENTRANCE = "convert_hf_to_neuron_state_dict"
"""The static method by which NxDI calls a model's converter, or which is it."""

_logger = logging.getLogger("nxdi_expertscale")


def patches(families: Sequence[MoEFamily]) -> list[Patch]:
    """One patch for each family's converter."""
    return [_patch(family) for family in families]


def _patch(family: MoEFamily) -> Patch:
    module, _, converter = family.converter.partition(":")
    return Patch(
        seam=seams.state_dict(family),
        module=module,
        attribute=converter,
        wrapper=_fusing_scales(family),
        find_incompatibility=lambda module: _incompatibility(module, family),
        is_native=lambda module: refers_to(attrgetter(converter)(module), flag.NAME),
    )


def _incompatibility(module: ModuleType, family: MoEFamily) -> str | None:
    converter = family.converter.partition(":")[2]
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
        state_dict, config, *_rest = inspect.signature(wrapped).bind(*args, **kwargs).args
        neuron_config = getattr(config, "neuron_config", None)
        if not flag.is_quantized(neuron_config):
            return wrapped(*args, **kwargs)
        if flag.is_on(neuron_config):
            flag.check_neuron_config(neuron_config)
            seams.require_seams(seams.needed_by_model(family), load=True)
        else:
            reason = engine.find_failed_seam(seams.needed_by_model(family), load=True)
            if reason is not None:
                _logger.warning("the experts' scales are left to NxDI: %s", reason)
                return wrapped(*args, **kwargs)
        layers = take_out_scales(state_dict, config, family)
        if family.converter_reads_stacked:
            stack_experts(state_dict, config, family)
        converted = wrapped(*args, **kwargs)
        put_in_scales(converted, layers, neuron_config, family)
        if layers or flag.is_on(neuron_config):
            _refuse_lost_scales(converted, family)
        return converted

    return convert


def take_out_scales(
    state_dict: dict[str, torch.Tensor], config: Any, family: MoEFamily
) -> list[LayerScales]:
    """Check and take the experts' scales out of a state dict, and dequantize its routers.

    Nothing is changed before everything is checked.

    Raises:
        CheckpointError: The state dict is malformed; the message names the tensor.
        ConfigurationError: It does not fit the config's dtype or exclusions.
    """
    from nxdi_expertscale.loading import expert_scales

    experts = _experts_of(config, family)
    check_range = not _is_vouched_for(state_dict, config.neuron_config)
    found = [
        expert_scales.collect(state_dict, family, layer, experts, check_range=check_range)
        for layer in range(config.num_hidden_layers)
    ]
    layers = [layer for layer in found if layer is not None]
    _check_against_config(state_dict, layers, config.neuron_config, family)
    routers = _dequantized_routers(state_dict, config, family)
    for key, weight in routers.items():
        state_dict[key] = weight
        del state_dict[_scale_name(key)]
    for layer in layers:
        for key in layer.consumed:
            del state_dict[key]
    return layers


def stack_experts(state_dict: dict[str, torch.Tensor], config: Any, family: MoEFamily) -> None:
    """Stack the experts of each layer for a converter that takes them so.

    Raises:
        CheckpointError: An expert is missing.
    """
    from nxdi_expertscale.loading import expert_weights

    experts = _experts_of(config, family)
    for layer in range(config.num_hidden_layers):
        expert_weights.stack(state_dict, family, layer, experts)


def _experts_of(config: Any, family: MoEFamily) -> int:
    experts = family.experts_of(config)
    if experts is None:
        raise _not_as_known(family, f"its config has none of {', '.join(family.num_experts)}")
    return experts


def put_in_scales(
    converted: dict[str, torch.Tensor],
    layers: Sequence[LayerScales],
    neuron_config: Any,
    family: MoEFamily,
) -> None:
    """Put the scales beside the fused weights: one per expert, or their average.

    Raises:
        IncompatibleUpstreamError: Upstream did not fuse the weights as it is known to.
    """
    from nxdi_expertscale.numerics import scales

    expert_wise = flag.fuses_expert_wise(neuron_config)
    if layers and not expert_wise:
        _warn_of_averaging(layers)
    for layer in layers:
        for fused, scale in layer.fused.items():
            weight = converted.get(family.fused_key(layer.layer, fused))
            key = family.fused_key(layer.layer, fused, "scale")
            if weight is None or weight.dim() != 3 or weight.shape[0] != scale.shape[0]:
                shape = None if weight is None else list(weight.shape)
                raise _not_as_known(
                    family,
                    f"{key} belongs to a fused weight of shape {shape}, where "
                    f"[{scale.shape[0]}, in, out] was expected",
                )
            if not layer.describe(fused, weight):
                raise _not_as_known(
                    family, f"{key} belongs to a weight that is not fused as it is known to be"
                )
            if key in converted:
                raise _not_as_known(family, f"NxDI makes {key} itself")
            layout = scale if expert_wise else scales.average(scale)
            try:
                padded = scales.pad(layout, weight.shape[2], len(family.fused[fused]))
            except ValueError as error:
                raise _not_as_known(family, f"{key}: {error}") from error
            converted[key] = padded
            if getattr(neuron_config, "hybrid_sharding_config", None) is not None:
                converted[_generation_key(key)] = padded.clone()


def _refuse_lost_scales(converted: Mapping[str, torch.Tensor], family: MoEFamily) -> None:
    """Make sure that no quantized weight has lost its scale, without which it means nothing."""
    from nxdi_expertscale.numerics import fp8

    for key, weight in converted.items():
        path, _, suffix = key.rpartition(".")
        if suffix == "weight" and fp8.is_quantized(weight) and f"{path}.scale" not in converted:
            raise _not_as_known(family, f"{key} is {weight.dtype} and has no scale")


def _not_as_known(family: MoEFamily, difference: str) -> IncompatibleUpstreamError:
    return IncompatibleUpstreamError(
        f"the experts' scales cannot be fused with this NxDI: seam {seams.state_dict(family)!r} "
        f"({family.converter}): {difference}. Install a release that is supported"
    )


def _generation_key(key: str) -> str:
    # Hybrid sharding has a second set of a layer's experts, cut otherwise, for token generation.
    # NxD's preshard hook (modules/moe/expert_mlps_v2.py) copies the weights for it, not the scales.
    return key.replace(".mlp_op.", ".mlp_op_tkg.")


def _warn_of_averaging(layers: Sequence[LayerScales]) -> None:
    from nxdi_expertscale.numerics import scales

    spreads = [scales.spread(scale) for layer in layers for scale in layer.fused.values()]
    largest = max(spread.largest for spread in spreads)
    median = sorted(spread.median for spread in spreads)[len(spreads) // 2]
    _logger.warning(
        "the experts' scales are averaged, because %s is off: they lie a factor of %.1f apart "
        "(median over channels; %.1f at most), and the model may answer nonsense. Set %s=True",
        flag.NAME,
        median,
        largest,
        flag.NAME,
    )


def _check_against_config(
    state_dict: dict[str, torch.Tensor],
    layers: Sequence[LayerScales],
    neuron_config: Any,
    family: MoEFamily,
) -> None:
    from nxdi_expertscale.numerics import fp8

    excluded = flag.exclusions(neuron_config)
    for layer in layers:
        if are_experts_excluded(layer.layer, excluded, family):
            raise ConfigurationError(
                f"{layer.consumed[0]}: layer {layer.layer}'s experts are quantized in the "
                f"checkpoint, and modules_to_not_convert keeps them in full precision; remove "
                "the exclusion, or quantize the checkpoint with it"
            )
    for key, weight in state_dict.items():
        path, _, suffix = key.rpartition(".")
        if suffix != "weight" or not fp8.is_quantized(weight) or family.names.is_router_key(key):
            continue
        if any(name in path for name in family.full_precision):
            raise CheckpointError(
                f"{key}: it is quantized in the checkpoint, and NxDI's converter has no place for "
                "its scale; make the checkpoint again with 'nxdi-expertscale quantize'"
            )
        if f"{path}.scale" in state_dict and any(name in path for name in excluded):
            raise ConfigurationError(
                f"{key}: it is quantized in the checkpoint, and modules_to_not_convert keeps its "
                "module in full precision; remove the exclusion, or quantize the checkpoint "
                "with it"
            )
    if layers:
        first = family.expert_key(layers[0].layer, 0, family.gate)
        _check_dtype(first, state_dict[first], neuron_config)


def _check_dtype(key: str, weight: torch.Tensor, neuron_config: Any) -> None:
    dtype = quantized_dtype(neuron_config)
    if dtype is not None and weight.dtype != dtype:
        raise ConfigurationError(
            f"{key}: its dtype is {weight.dtype}, it has a scale, and quantization_dtype="
            f"{neuron_config.quantization_dtype!r} makes NxDI read it as {dtype}; set "
            "quantization_dtype='f8e4m3' for an FP8 checkpoint"
        )


def _dequantized_routers(
    state_dict: dict[str, torch.Tensor], config: Any, family: MoEFamily
) -> dict[str, torch.Tensor]:
    """The routers that a checkpoint has quantized, in the model's own dtype, by their names."""
    from nxdi_expertscale.numerics import fp8, scales

    routers = {}
    for layer in range(config.num_hidden_layers):
        key = family.router_key(layer)
        weight = state_dict.get(key)
        if weight is None or not fp8.is_quantized(weight):
            continue
        scale = state_dict.get(_scale_name(key))
        if scale is None:
            raise CheckpointError(
                f"{_scale_name(key)}: missing, and the router's weight is {weight.dtype}; make "
                "the checkpoint again with 'nxdi-expertscale quantize'"
            )
        try:
            per_channel = scales.channel_scale(scale, weight.shape[0])
        except ValueError as error:
            raise CheckpointError(f"{_scale_name(key)}: {error}") from error
        if scales.first_invalid(per_channel.unsqueeze(0)) is not None:
            raise CheckpointError(f"{_scale_name(key)}: a scale must be finite and positive")
        values = fp8.dequantize(weight, per_channel.T)
        routers[key] = values.to(getattr(config.neuron_config, "torch_dtype", values.dtype))
    if routers:
        _logger.warning(
            "%d routers are quantized in the checkpoint and were dequantized; quantize it with "
            "'nxdi-expertscale quantize', which leaves routers as they are",
            len(routers),
        )
    return routers


def _scale_name(weight_key: str) -> str:
    return weight_key.removesuffix("weight") + "scale"


def _is_vouched_for(state_dict: Mapping[str, torch.Tensor], neuron_config: Any) -> bool:
    """Whether a state dict is that of a finished folder of ours, whose weights are in range.

    The state dict of a draft is converted with the same settings, and comes from another folder:
    the names have to be those of the manifest's folder.
    """
    from nxdi_expertscale.checkpoint.write.manifest import is_untouched, tensor_names

    folder = getattr(neuron_config, "quantized_checkpoints_path", None)
    if not folder:
        return False
    try:
        names = tensor_names(folder) if is_untouched(folder) else None
    except CheckpointError as error:
        _logger.warning("the range of every weight is checked: %s", error)
        return False
    return names is not None and all(_name_in_state_dict(name) in state_dict for name in names)


def _name_in_state_dict(name: str) -> str:
    # Upstream: application_base.py, get_state_dict.
    name = name.removeprefix("model.")
    is_scale = name.endswith(".weight_scale")
    return name.removesuffix("weight_scale") + "scale" if is_scale else name
