"""The two passes in which NxD's ``convert`` quantizes a model's modules.

NxDI has one pass, with one type for all layers. Here the experts get a pass of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.exclusions import are_experts_excluded, is_excluded
from nxdi_expertscale.families.lookup import HOW_TO_DECLARE
from nxdi_expertscale.loading.layout import LayoutError
from nxdi_expertscale.settings.settings import FLAG, PER_CHANNEL, Settings

_CARRIED_OVER = ("quantized_dtype", "activation_quantization_type", "clamp_bound")


_EXPERTS = "ExpertFusedLinear"

_SHARED_EXPERTS = "SharedExperts"
"""Multiplies by the weights of its layers as they are (``modules/moe/shared_experts.py``)."""

_PARALLEL_LINEARS = ("ColumnParallelLinear", "RowParallelLinear")
"""Have no quantized form with a bias (``quantization/quantization_layers.py``)."""


@dataclass(frozen=True)
class ExpertLayer:
    """One of a model's fused expert layers.

    Attributes:
        paths: Every dotted path at which it stands. NxD's fused token generation
            (``modules/moe/moe_fused_tkg.py``) holds the experts of a layer a second time, and NxD's
            ``convert`` walks along both paths.
        quantization_type: NxD's name of the type that it is quantized in; empty where it is not.
        weight_shape: Of its weight, ``[E, in, out]``.
        scale_shape: Of its scale; empty where it has none.
    """

    paths: tuple[str, ...]
    quantization_type: str
    weight_shape: tuple[int, ...]
    scale_shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The first of its paths."""
        return self.paths[0]

    @property
    def is_quantized(self) -> bool:
        """Whether NxD has converted it."""
        return self.quantization_type != ""


@dataclass(frozen=True)
class Passes:
    """What each pass is given.

    Attributes:
        skipped: Names for ``modules_to_not_convert`` of NxDI's own pass: whole paths, but for what
            the family cannot load quantized.
        expert_wise: Names for ``include`` of a pass for the experts; none where there is no such
            pass.
    """

    skipped: tuple[str, ...]
    expert_wise: tuple[str, ...] = ()


def find_expert_layers(model: torch.nn.Module) -> tuple[ExpertLayer, ...]:
    """Find a model's fused expert layers, quantized or not, in the order of its modules."""
    paths: dict[int, list[str]] = {}
    found: dict[int, torch.nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _is_a(module, _EXPERTS):
            found[id(module)] = module
            paths.setdefault(id(module), []).append(path)
    return tuple(
        ExpertLayer(
            paths=tuple(paths[key]),
            quantization_type=_quantization_type(module),
            weight_shape=_shape(module, "weight"),
            scale_shape=_shape(module, "scale"),
        )
        for key, module in found.items()
    )


def find_excluded_modules(
    model: torch.nn.Module, modules_to_not_convert: Sequence[str], family: MoEFamily
) -> tuple[str, ...]:
    """Find the modules beside the experts that stay in full precision, by their paths.

    They are those that exclusions name, and those that NxD cannot load quantized. NxD takes names
    as parts of paths, and those of modules alone: it would leave the queries alone for ``v_proj``,
    which is a part of ``qkv_proj``, and nothing for a checkpoint's names.

    Raises:
        ConfigurationError: They name a part of what NxDI fuses.
    """
    shared = tuple(
        f"{path}."
        for path, module in model.named_modules(remove_duplicate=False)
        if _is_a(module, _SHARED_EXPERTS)
    )
    return tuple(
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if hasattr(module, "weight")
        and family.names.layer_of_module(path) is None
        and (
            is_excluded(path, modules_to_not_convert, family)
            or path.startswith(shared)
            or (_is_a(module, *_PARALLEL_LINEARS) and getattr(module, "bias", None) is not None)
        )
    )


def plan_passes(
    layers: Sequence[ExpertLayer],
    excluded_modules: Sequence[str],
    modules_to_not_convert: Sequence[str],
    family: MoEFamily,
    *,
    expert_wise: bool,
) -> Passes:
    """Decide which modules each pass skips or takes.

    Args:
        layers: The model's expert layers; those that are quantized already are left alone.
        excluded_modules: What :func:`find_excluded_modules` gave.
        modules_to_not_convert: What NxDI gives ``convert``.
        family: The model's family, whose names the layers have.
        expert_wise: Whether the experts get a pass of their own.

    Raises:
        ConfigurationError: NxD could not load the experts that it would make.
    """
    layers = [layer for layer in layers if not layer.is_quantized]
    kept = [layer for layer in layers if is_kept(layer, modules_to_not_convert, family)]
    skipped = (*excluded_modules, *_paths(kept), *family.full_precision)
    if not expert_wise:
        return Passes(skipped)
    _check_second_experts(layers)
    converted = _paths([layer for layer in layers if layer not in kept])
    return Passes((*skipped, *converted), converted)


def is_kept(layer: ExpertLayer, modules_to_not_convert: Sequence[str], family: MoEFamily) -> bool:
    """Whether exclusions keep an expert layer in full precision."""
    number = family.names.layer_of_module(layer.name)
    return number is not None and are_experts_excluded(number, modules_to_not_convert, family)


def find_family(layers: Sequence[ExpertLayer], settings: Settings) -> MoEFamily | None:
    """The family by whose names a model's expert layers are converted.

    Returns:
        None where the flag is off, and no family has layers of these names.

    Raises:
        ConfigurationError: The flag is on, and no plugin declares the model's family.
        LayoutError: The flag is on, and a layer has another name than the family's.
    """
    family = settings.family
    if family is None:
        if not settings.is_on:
            return None
        name = None if settings.model is None else settings.model.name
        raise ConfigurationError(
            f"{FLAG}=True is not supported for this model ({name!r}): no plugin declares its "
            f"family; turn the flag off. {HOW_TO_DECLARE}"
        )
    for layer in layers:
        if family.names.layer_of_module(layer.name) is None:
            if not settings.is_on:
                return None
            raise LayoutError(f"{layer.name} is not one of {family.expert_mlps}")
    return family


def expert_wise_q_config(
    q_config: Mapping[str, object], expert_wise_defaults: Mapping[str, object]
) -> dict[str, object]:
    """Make NxD's settings for the experts from those for everything else.

    Args:
        q_config: The settings for everything else.
        expert_wise_defaults: NxD's own expert-wise settings.

    Returns:
        The latter, with the dtype and the bounds of the former.

    Raises:
        ConfigurationError: The settings for everything else are not per-channel.
    """
    found = _value_of(q_config.get("quantization_type"))
    if found != PER_CHANNEL:
        raise ConfigurationError(
            f"{FLAG}=True needs quantization_type={PER_CHANNEL!r}, not {found!r}"
        )
    carried = {name: q_config[name] for name in _CARRIED_OVER if name in q_config}
    return {**expert_wise_defaults, **carried}


def check_quantized_dtype(
    wanted: torch.dtype | None, q_config: Mapping[str, object], quantization_dtype: object
) -> None:
    """Check that NxDI makes layers of the dtype that the config names.

    Up to 0.6 its ``load_module`` knows ``f8e4m3`` alone, and takes int8 for every other name.

    Args:
        wanted: The dtype that ``quantization_dtype`` stands for; None where it names none.
        q_config: NxDI's settings for the modules.
        quantization_dtype: The setting's value, for the message.

    Raises:
        ConfigurationError: It does not: the weights would be cast without their scales.
    """
    found = _value_of(q_config["quantized_dtype"])
    if wanted is not None and wanted != found:
        raise ConfigurationError(
            f"quantization_dtype={quantization_dtype!r}: this release of NxDI makes {found} "
            "layers of it; use quantization_dtype='f8e4m3' or 'int8'"
        )


def _check_second_experts(layers: Sequence[ExpertLayer]) -> None:
    """Check that hybrid sharding and fused token generation do not meet.

    NxD's fused token generation has the experts at a second path, at which nothing is to be loaded.
    It says so to ``mlp_op`` (``modules/moe/moe_fused_tkg.py``, the hook after quantization), and
    not to hybrid sharding's ``mlp_op_tkg``, which it does not compute with either.
    """
    for layer in layers:
        if ".mlp_op_tkg." in layer.name and len(layer.paths) > 1:
            raise ConfigurationError(
                "hybrid_sharding_config: NxD cannot load quantized experts both for hybrid "
                f"sharding and for fused token generation, and this model has {layer.name} for "
                "both; remove hybrid_sharding_config, or moe_fused_nki_kernel_enabled where it "
                "is set"
            )


def _is_a(module: torch.nn.Module, *names: str) -> bool:
    """Whether a module is of a class of NxD, by its name, wherever this release keeps it."""
    return any(parent.__name__ in names for parent in type(module).__mro__)


def _paths(layers: Sequence[ExpertLayer]) -> tuple[str, ...]:
    return tuple(path for layer in layers for path in layer.paths)


def _quantization_type(module: torch.nn.Module) -> str:
    return str(_value_of(getattr(module, "quantization_type", "")))


def _shape(module: torch.nn.Module, name: str) -> tuple[int, ...]:
    return tuple(getattr(getattr(module, name, None), "shape", ()))


def _value_of(setting: object) -> object:
    """A setting that upstream may hold as a member of an enumeration."""
    return getattr(setting, "value", setting)
