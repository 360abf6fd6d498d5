"""A state dict on its way through NxDI's converter, which knows nothing of scales.

Before it, the experts' scales are taken out (:func:`take_out_scales`); after it, they are put in
again, fused as the weights are (:func:`put_in_scales`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, MutableMapping, Sequence

import torch

from nxdi_expertscale.errors import CheckpointError, ConfigurationError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.exclusions import (
    are_experts_excluded,
    attention_without_scales,
    is_excluded,
)
from nxdi_expertscale.families.known_modules import check_names
from nxdi_expertscale.loading import expert_scales, expert_weights
from nxdi_expertscale.loading.channel_scales import per_channel_scales
from nxdi_expertscale.loading.expert_scales import LayerScales
from nxdi_expertscale.loading.fused_sample import Samplers, take_now
from nxdi_expertscale.loading.layout import LayoutError
from nxdi_expertscale.loading.names import in_state_dict, scale_in_state_dict, scale_of
from nxdi_expertscale.loading.routers import dequantized_routers, replace_routers
from nxdi_expertscale.loading.threads import one_thread
from nxdi_expertscale.loading.values import check_values
from nxdi_expertscale.numerics import fp8, scales
from nxdi_expertscale.settings.settings import FLAG, PER_CHANNEL, Settings

_logger = logging.getLogger("nxdi_expertscale")

StateDict = MutableMapping[str, torch.Tensor]


def name_for_modules(state_dict: StateDict, family: MoEFamily) -> None:
    """Give tensors the names that NxDI has for them, where nothing else does.

    A scale is ``.scale`` in NxDI: some models have a ``get_state_dict`` of their own, which leaves
    the checkpoint's ``.weight_scale``. What a family renames is renamed with its scale.

    Args:
        state_dict: A checkpoint's tensors as NxDI's converter is given them; changed in place.
        family: The names in it.

    Raises:
        CheckpointError: A tensor is there under both names.
    """
    for old in list(state_dict):
        new = family.renamed(scale_in_state_dict(old))
        if new == old:
            continue
        if new in state_dict:
            raise CheckpointError(f"{old}: is there as {new} as well; remove one of the two")
        state_dict[new] = state_dict.pop(old)


def take_out_scales(
    state_dict: StateDict,
    family: MoEFamily,
    settings: Settings,
    *,
    quantized_dtype: torch.dtype | None = None,
    checked_tensors: Collection[str] = (),
) -> list[LayerScales]:
    """Check and take out the experts' scales, dequantize routers, stack experts where needed.

    Nothing is changed before everything is checked.

    Args:
        state_dict: A checkpoint's tensors as NxDI's converter takes them; changed in place.
        family: The names in it.
        settings: What it is loaded with.
        quantized_dtype: The dtype that ``quantization_dtype`` stands for; None where it names
            none.
        checked_tensors: Names, as the checkpoint has them, of the tensors of a finished folder of
            ours, whose weights are within Neuron's range; none for any other checkpoint.

    Returns:
        The scales of each layer that has any.

    Raises:
        CheckpointError: The state dict is malformed; the message names the tensor.
        ConfigurationError: It does not fit the config's dtype or exclusions.
        LayoutError: The config does not say how many experts there are.
    """
    num_experts = settings.num_experts
    if num_experts is None:
        raise LayoutError(f"its config has none of {', '.join(family.num_experts)}")
    _check_names(state_dict, family, settings)
    with one_thread():
        found = [
            expert_scales.collect(state_dict, family, layer, num_experts)
            for layer in range(settings.num_layers)
        ]
        layers = [layer for layer in found if layer is not None]
        scales_of_experts = frozenset(key for layer in layers for key in layer.consumed)
        known = scales_of_experts | _known_weights(state_dict, checked_tensors)
        check_values(state_dict, known=known)
        check_exclusions(state_dict, layers, family, settings.exclusions)
        _check_dtype(state_dict, layers, family, settings, quantized_dtype)
        dtype = _torch_dtype(settings)
        routers = dequantized_routers(state_dict, family, settings.num_layers, dtype)
        per_channel = {}
        if settings.quantization_type == PER_CHANNEL:
            per_channel = per_channel_scales(state_dict, family)
    replace_routers(state_dict, routers)
    state_dict.update(per_channel)
    for scale in scales_of_experts:
        del state_dict[scale]
    if family.converter_reads_stacked:
        for layer in layers:
            take_now(layer.samplers, state_dict)
        for number in range(settings.num_layers):
            expert_weights.stack(state_dict, family, number, num_experts)
    return layers


def _check_names(
    state_dict: Mapping[str, torch.Tensor], family: MoEFamily, settings: Settings
) -> None:
    if not settings.exclusions:
        return
    modules = {key.rpartition(".")[0] for key in state_dict}
    try:
        check_names(settings.exclusions, modules, settings.num_layers, family)
    except ConfigurationError as error:
        if settings.is_on:
            raise
        _logger.warning("%s", error)


def _known_weights(
    state_dict: Mapping[str, torch.Tensor], checked_tensors: Collection[str]
) -> frozenset[str]:
    """Names of the weights that are known to be within range.

    The state dict of a draft is converted with the same settings, and comes from another folder:
    all names have to be those of the folder.
    """
    names = [in_state_dict(name) for name in checked_tensors]
    if not all(name in state_dict for name in names):
        return frozenset()
    return frozenset(name for name in names if name.endswith("weight"))


def check_exclusions(
    state_dict: Mapping[str, torch.Tensor],
    layers: Sequence[LayerScales],
    family: MoEFamily,
    exclusions: Sequence[str],
) -> None:
    """Check that nothing is quantized in a checkpoint that its module keeps in full precision.

    Raises:
        CheckpointError: NxDI's converter has no place for a quantized tensor's scale.
        ConfigurationError: ``modules_to_not_convert`` excludes a quantized tensor's module.
    """
    for layer in layers:
        if are_experts_excluded(layer.layer, exclusions, family):
            raise ConfigurationError(
                f"{layer.consumed[0]}: layer {layer.layer}'s experts are quantized in the "
                f"checkpoint, and modules_to_not_convert keeps them in full precision; remove "
                "the exclusion, or quantize the checkpoint with it"
            )
    experts = {key for layer in layers for key in layer.consumed}
    for key, weight in state_dict.items():
        if not fp8.is_quantized(weight) or scale_of(key) in experts:
            continue
        path, _, suffix = key.rpartition(".")
        if suffix != "weight" or family.names.is_router_key(key):
            continue
        if any(name in path for name in family.full_precision):
            raise CheckpointError(
                f"{key}: it is quantized in the checkpoint, and NxDI's converter has no place for "
                "its scale; make the checkpoint again with 'nxdi-expertscale quantize'"
            )
        if f"{path}.scale" in state_dict and is_excluded(path, exclusions, family):
            raise ConfigurationError(
                f"{key}: it is quantized in the checkpoint, and modules_to_not_convert keeps its "
                "module in full precision; remove the exclusion, or quantize the checkpoint "
                "with it"
            )


def _check_dtype(
    state_dict: Mapping[str, torch.Tensor],
    layers: Sequence[LayerScales],
    family: MoEFamily,
    settings: Settings,
    wanted: torch.dtype | None,
) -> None:
    """Check that the experts have the dtype that the config makes NxDI read them as."""
    if not layers or wanted is None:
        return
    key = family.expert_key(layers[0].layer, 0, family.gate)
    found = state_dict[key].dtype
    if found != wanted:
        raise ConfigurationError(
            f"{key}: its dtype is {found}, it has a scale, and quantization_dtype="
            f"{settings.quantization_dtype!r} makes NxDI read it as {wanted}; set "
            "quantization_dtype='f8e4m3' for an FP8 checkpoint"
        )


def names_for_converter(
    settings: Settings, family: MoEFamily, state_dict: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    """The exclusions with those names by which NxDI's converter knows a layer's attention.

    Args:
        settings: What the model is loaded with.
        family: The names in the state dict.
        state_dict: A checkpoint's tensors. An attention is in full precision there as well that
            cannot be quantized, because it has biases.

    Raises:
        ConfigurationError: They name a part of what NxDI fuses.
    """
    if not settings.fused_qkv:
        return settings.exclusions
    attention = attention_without_scales(settings.exclusions, settings.num_layers, family)
    biased = (
        linear.module_paths(layer)[0].rpartition(".")[0].rpartition(".")[0]
        for layer in range(settings.num_layers)
        for linear in family.renamed_linears
        if linear.fused and _is_biased(state_dict, linear.checkpoint_path(layer))
    )
    return tuple(dict.fromkeys((*settings.exclusions, *attention, *biased)))


def _is_biased(state_dict: Mapping[str, torch.Tensor], path: str) -> bool:
    return f"{path}.bias" in state_dict and f"{path}.scale" not in state_dict


def samplers(layers: Sequence[LayerScales]) -> Samplers:
    """What looks at the experts' weights of all layers while NxDI's converter reads them."""
    return {name: sampler for layer in layers for name, sampler in layer.samplers.items()}


@one_thread()
def put_in_scales(
    converted: StateDict,
    layers: Sequence[LayerScales],
    family: MoEFamily,
    settings: Settings,
) -> None:
    """Put the scales beside the fused weights: one for each expert, or their average.

    Args:
        converted: What NxDI's converter made; changed in place. A fused weight is
            ``[E, in, dim]``, its scale becomes ``[E, 1, dim]`` or ``[1, 1, dim]``.
        layers: What :func:`take_out_scales` gave.
        family: The names in it.
        settings: What it is loaded with.

    Raises:
        LayoutError: NxDI did not fuse the weights as it is known to.
    """
    if layers and not settings.keeps_scales_apart:
        _warn_of_averaging(layers)
    for layer in layers:
        for fused, scale in layer.fused.items():
            key = family.fused_key(layer.layer, fused, "scale")
            _check_fused_weight(converted, layer, fused, family)
            layout = scale if settings.keeps_scales_apart else scales.average(scale)
            width = converted[family.fused_key(layer.layer, fused)].shape[2]
            try:
                padded = scales.pad(layout, width, len(family.fused[fused]))
            except ValueError as error:
                raise LayoutError(f"{key}: {error}") from error
            converted[key] = padded
            if settings.experts is not None and settings.experts.is_hybrid_sharded:
                converted[_key_for_token_generation(key)] = padded.clone()
    if layers or settings.is_on:
        check_scales_are_there(converted)


def check_scales_are_there(converted: Mapping[str, torch.Tensor]) -> None:
    """Check that no quantized weight has lost its scale, without which it means nothing.

    Raises:
        LayoutError: One has none.
    """
    for key, weight in converted.items():
        if key.endswith(".weight") and fp8.is_quantized(weight) and scale_of(key) not in converted:
            raise LayoutError(f"{key} is {weight.dtype} and has no scale")


def _torch_dtype(settings: Settings) -> torch.dtype:
    dtype = getattr(torch, settings.torch_dtype.removeprefix("torch."), torch.float32)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _check_fused_weight(
    converted: Mapping[str, torch.Tensor], layer: LayerScales, fused: str, family: MoEFamily
) -> None:
    key = family.fused_key(layer.layer, fused, "scale")
    num_experts = layer.fused[fused].shape[0]
    weight = converted.get(family.fused_key(layer.layer, fused))
    if weight is None or weight.dim() != 3 or weight.shape[0] != num_experts:
        shape = None if weight is None else list(weight.shape)
        raise LayoutError(
            f"{key} belongs to a fused weight of shape {shape}, where [{num_experts}, in, out] "
            "was expected"
        )
    if not layer.matches_layout(fused, weight):
        raise LayoutError(f"{key} belongs to a weight that is not fused as it is known to be")
    if key in converted:
        raise LayoutError(f"NxDI makes {key} itself")


def _key_for_token_generation(key: str) -> str:
    # Hybrid sharding has a second set of a layer's experts, cut otherwise, for token generation.
    # NxD's preshard hook (modules/moe/expert_mlps_v2.py) copies the weights for it, not the scales.
    return key.replace(".mlp_op.", ".mlp_op_tkg.")


def _warn_of_averaging(layers: Sequence[LayerScales]) -> None:
    spreads = [scales.spread(scale) for layer in layers for scale in layer.fused.values()]
    largest = max(spread.largest for spread in spreads)
    median = sorted(spread.median for spread in spreads)[len(spreads) // 2]
    _logger.warning(
        "the experts' scales are averaged, because %s is off: they lie a factor of %.1f apart "
        "(median over channels; %.1f at most), and the model may answer nonsense. Set %s=True",
        FLAG,
        median,
        largest,
        FLAG,
    )
