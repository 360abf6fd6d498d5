"""Whether the experts of a model that NxDI has built are what its config asks for."""

from __future__ import annotations

from collections.abc import Sequence

from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.loading.layout import LayoutError
from nxdi_expertscale.loading.passes import ExpertLayer, is_kept
from nxdi_expertscale.settings.settings import EXPERT_WISE


def check_expert_wise(
    layers: Sequence[ExpertLayer], exclusions: Sequence[str], family: MoEFamily
) -> None:
    """Check that a model has all expert layers, each with its scales or in full precision.

    Args:
        layers: The expert layers of the model as it was built.
        exclusions: ``modules_to_not_convert``.
        family: The model's family.

    Raises:
        LayoutError: NxDI did not convert them through the function that is patched, or its
            modules have other names.
    """
    for layer in layers:
        wanted = "" if is_kept(layer, exclusions, family) else EXPERT_WISE
        if layer.quantization_type != wanted:
            raise LayoutError(
                f"{layer.name} is {layer.quantization_type or 'not quantized'}, and "
                f"{wanted or 'full precision'} was asked for; it was not converted through the "
                "function that is patched"
            )
        if wanted and not _has_scale_of_each_expert(layer):
            raise LayoutError(
                f"{layer.name} has no scale of shape [E, 1, dim], but {layer.scale_shape or None}"
            )
    names = [layer.name for layer in layers]
    missing = [name for name in _expected(names, family) if name not in names]
    if missing:
        raise LayoutError(f"the model has no module for {missing[0]}, but {names[:2]}")


def _has_scale_of_each_expert(layer: ExpertLayer) -> bool:
    shape = layer.scale_shape
    return len(shape) == 3 and shape[:2] == (layer.weight_shape[0], 1)


def _expected(names: Sequence[str], family: MoEFamily) -> list[str]:
    """The expert layers that a model has that has some of these."""
    numbers = (family.names.layer_of_module(name) for name in names)
    return [
        family.fused_key(number, fused).removesuffix(".weight")
        for number in numbers
        if number is not None
        for fused in family.fused
    ] or ["the experts of any layer"]
