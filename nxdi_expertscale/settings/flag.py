"""What ``expert_wise_scale`` asks of a configuration, checked before anything is compiled.

The configurations are upstream's objects, read by attribute (``NeuronConfig`` and
``InferenceConfig`` of ``neuronx_distributed_inference/models/config.py``). Releases differ in the
attributes that they have; one that is absent is a feature that this release has not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.exclusions import are_experts_excluded
from nxdi_expertscale.families.unsupported import why_unsupported
from nxdi_expertscale.settings import expert_parallel

_logger = logging.getLogger("nxdi_expertscale")

NAME = "expert_wise_scale"
PER_CHANNEL = "per_channel_symmetric"
EXPERT_WISE = "expert_wise_per_channel_symmetric"


def parse(value: object) -> bool:
    """The flag's value, which must be a boolean.

    Raises:
        ConfigurationError: It is something else, such as the string ``"true"``.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{NAME} must be true or false, not {value!r}")
    return value


def is_on(neuron_config: Any) -> bool:
    """Whether a neuron config asks for one scale per expert."""
    return getattr(neuron_config, NAME, False) is True


def is_quantized(neuron_config: Any) -> bool:
    """Whether the model that this neuron config describes is loaded quantized."""
    return bool(
        getattr(neuron_config, "quantized", False)
        or getattr(neuron_config, "quantized_mlp_kernel_enabled", False)
    )


def is_fp8(neuron_config: Any) -> bool:
    """Whether ``quantization_dtype`` is one of FP8 (``f8e4m3``, ``f8e5m2``)."""
    dtype = getattr(neuron_config, "quantization_dtype", "")
    # A string in most configs, and NxD's QuantizedDtype in others.
    return str(getattr(dtype, "name", dtype)).lower().startswith("f8")


def quantization_type(neuron_config: Any) -> str:
    """The quantization type by its name, whether upstream holds it as a string or an enum."""
    value = getattr(neuron_config, "quantization_type", PER_CHANNEL)
    return str(getattr(value, "value", value))


def fuses_expert_wise(neuron_config: Any) -> bool:
    """Whether the experts' scales are kept apart: by the flag, or by upstream's own type."""
    return is_on(neuron_config) or quantization_type(neuron_config) == EXPERT_WISE


def exclusions(neuron_config: Any) -> tuple[str, ...]:
    """Names of the modules that stay in full precision, ``modules_to_not_convert``."""
    return tuple(getattr(neuron_config, "modules_to_not_convert", None) or ())


def check_neuron_config(neuron_config: Any) -> None:
    """Check what needs only the neuron config.

    Raises:
        ConfigurationError: The flag is on together with another quantization type.
    """
    if not is_on(neuron_config) or not is_quantized(neuron_config):
        return
    found = quantization_type(neuron_config)
    if found != PER_CHANNEL:
        raise ConfigurationError(
            f"{NAME}=True needs quantization_type={PER_CHANNEL!r}, not {found!r}: the experts "
            "then get one scale per expert, everything else stays per-channel"
        )


def warn_if_without_effect(neuron_config: Any) -> None:
    """Say so where the flag is on and the model is not quantized."""
    if is_on(neuron_config) and not is_quantized(neuron_config):
        _logger.warning("%s has no effect: the model is not quantized (quantized=False)", NAME)


@dataclass(frozen=True)
class Upstream:
    """What the installed release does with the experts of a family.

    Attributes:
        reads_moe_settings: Whether it builds them from the neuron config's settings for experts
            (NxDI's ``modules/moe_v2.py``); otherwise these have no effect (``modules/moe.py``).
        kernel_cores: Numbers of logical cores for which it runs contexts through a blockwise
            kernel; none on a CPU.
    """

    reads_moe_settings: bool
    kernel_cores: frozenset[int]


def check_model(
    neuron_config: Any, model_config: Any, family: MoEFamily, upstream: Upstream
) -> None:
    """Check what a quantized model with the flag needs of its experts, batch and parallelism.

    Args:
        neuron_config: NxDI's ``NeuronConfig``.
        model_config: NxDI's ``InferenceConfig``, or whatever holds the model's sizes.
        family: The model's family.
        upstream: What the installed release does with this family's experts.

    Raises:
        ConfigurationError: The model could not run; the message says what to set instead.
    """
    experts = family.experts_of(model_config)
    top_k = family.experts_per_token_of(model_config)
    if getattr(neuron_config, "ep_degree", None) not in (None, 1):
        raise ConfigurationError(
            f"{NAME}=True with ep_degree={neuron_config.ep_degree}: no release of NxDI generates "
            "tokens with it; use moe_ep_degree, where the release has it, or ep_degree=1"
        )
    if experts is not None and top_k is not None:
        expert_parallel.check(neuron_config, experts, top_k)
    _check_logical_nc(neuron_config, upstream)


def check_cast(neuron_config: Any) -> None:
    """Check that NxDI leaves the quantized weights of a checkpoint in their dtype.

    It casts every float to ``torch_dtype`` but for scales and ``f8e4m3``
    (``models/application_base.py``, ``checkpoint_loader_fn``), and its layers expect ``f8e5m2``.

    Raises:
        ConfigurationError: It would cast them.
    """
    name = str(getattr(neuron_config, "quantization_dtype", "")).lower()
    torch_dtype = str(getattr(neuron_config, "torch_dtype", "torch.float32"))
    casts = getattr(neuron_config, "cast_type", "config") == "config"
    if is_quantized(neuron_config) and "f8e5m2" in name and casts and "float32" not in torch_dtype:
        raise ConfigurationError(
            f"quantization_dtype='f8e5m2': NxDI casts such weights to {torch_dtype} when it reads "
            "a checkpoint, and not back; use quantization_dtype='f8e4m3', or "
            "cast_type='as-declared'"
        )


def check_shared_scale(
    neuron_config: Any, model_config: Any, family: MoEFamily | None, *, reads_moe_settings: bool
) -> None:
    """Check a model whose experts share a scale: some modes need one for each.

    Args:
        neuron_config: NxDI's ``NeuronConfig``.
        model_config: NxDI's ``InferenceConfig``, or whatever holds the model's sizes.
        family: The model's family; None for a dense model, which is left alone.
        reads_moe_settings: As in :class:`Upstream`.

    Raises:
        ConfigurationError: The config asks for expert parallelism, or for fused token generation.
    """
    if family is None or not is_quantized(neuron_config) or fuses_expert_wise(neuron_config):
        return
    excluded = exclusions(neuron_config)
    layers = range(getattr(model_config, "num_hidden_layers", 0))
    if all(are_experts_excluded(layer, excluded, family) for layer in layers):
        return
    degree = max(expert_parallel.degrees(neuron_config))
    if reads_moe_settings and degree > 1:
        # Upstream: neuronx_distributed/trace/trace.py, shard_children, takes a rank's experts out
        # of each of a layer's tensors, and this one has one row. It says so after compilation.
        raise ConfigurationError(
            f"expert parallelism (degree {degree}): a scale that the experts share cannot be "
            f"spread over ranks; set {NAME}=True, or moe_ep_degree=1"
        )
    if getattr(model_config, "moe_fused_nki_kernel_enabled", False):
        # Upstream: neuronx_distributed/modules/moe/moe_fused_tkg.py views it as [E, 2, I].
        raise ConfigurationError(
            "moe_fused_nki_kernel_enabled=True: the kernel reads one scale per expert, and here "
            f"the experts share one; set {NAME}=True, or moe_fused_nki_kernel_enabled=False"
        )


def _check_logical_nc(neuron_config: Any, upstream: Upstream) -> None:
    # Upstream: neuronx_distributed/modules/moe/expert_mlps_v2.py, forward_blockwise, asserts 2
    # for expert-wise scales.
    if not _uses_blockwise_kernel(neuron_config, upstream):
        return
    holders = [(neuron_config, "logical_nc_config")]
    if upstream.reads_moe_settings:
        blockwise = getattr(neuron_config, "blockwise_matmul_config", None)
        holders.insert(0, (blockwise, "blockwise_matmul_config.logical_nc_config"))
    if _cores(holders[0][0]) not in upstream.kernel_cores:
        return
    for holder, setting in holders:
        cores = _cores(holder)
        if cores != 2:
            raise ConfigurationError(
                f"{NAME}=True needs {setting}=2, not {cores}: the blockwise kernel knows one "
                "scale per expert on two logical cores only; set it to 2 (also "
                f"NEURON_LOGICAL_NC_CONFIG, if it is set){_without_kernel(upstream)}"
            )


def _cores(holder: Any) -> int:
    value = getattr(holder, "logical_nc_config", 2)
    if isinstance(value, Mapping):
        # A member of an enumeration, as NxDI's ``to_json_string`` writes it and does not read it.
        value = value["_value_"]
    return int(getattr(value, "value", value))


def _uses_blockwise_kernel(neuron_config: Any, upstream: Upstream) -> bool:
    if not getattr(neuron_config, "glu_mlp", True):
        return False
    if not upstream.reads_moe_settings:
        return getattr(neuron_config, "capacity_factor", None) is None
    blockwise = getattr(neuron_config, "blockwise_matmul_config", None)
    return not getattr(blockwise, "use_torch_block_wise", False)


def _without_kernel(upstream: Upstream) -> str:
    if not upstream.reads_moe_settings:
        return ""
    return ', or set blockwise_matmul_config={"use_torch_block_wise": True}'


def family_of_model(model_config: Any, families: Sequence[MoEFamily]) -> MoEFamily | None:
    """The family that a model's config belongs to, or None for a dense or unknown model.

    By its ``model_type``; where there is none, by the upstream module that defines its class.
    """
    model_type, modules = _identity(model_config)
    for family in families:
        by_type = model_type in family.model_types
        if by_type or (not model_type and family.converter.partition(":")[0] in modules):
            return family
    return None


def refuse_unsupported(neuron_config: Any, model_config: Any) -> None:
    """Refuse the flag for a model of which it is known that it cannot have it.

    Raises:
        ConfigurationError: It is one; the message says why.
    """
    if not is_on(neuron_config) or not is_quantized(neuron_config):
        return
    model_type, modules = _identity(model_config)
    reason = why_unsupported(model_type, modules)
    if reason is not None:
        name = model_type or type(model_config).__name__
        raise ConfigurationError(f"{NAME}=True is not supported for {name!r}: {reason}")


def _identity(model_config: Any) -> tuple[str | None, set[str]]:
    """A config's ``model_type``, and the modules that define its class."""
    modules = {parent.__module__ for parent in type(model_config).__mro__}
    return getattr(model_config, "model_type", None), modules
