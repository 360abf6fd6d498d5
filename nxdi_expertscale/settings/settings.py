"""What NxDI's two config objects ask for, read once into one frozen object.

They are NxDI's ``NeuronConfig`` and ``InferenceConfig`` (``models/config.py``), read by attribute.
Releases differ in the attributes that they have: one that is absent is a feature that this release
does not have, and its default stands in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nxdi_expertscale.families.config_fields import first_int
from nxdi_expertscale.families.declaration import MoEFamily
from nxdi_expertscale.families.exclusions import expand_exclusions
from nxdi_expertscale.families.lookup import family_of
from nxdi_expertscale.settings.expert_parallel import ExpertParallelism, read_expert_parallelism

FLAG = "expert_wise_scale"
"""The keyword of ``MoENeuronConfig`` that this package adds."""
PER_CHANNEL = "per_channel_symmetric"
EXPERT_WISE = "expert_wise_per_channel_symmetric"
"""Values of NxD's ``QuantizationType``."""

_LENGTHS = ("seq_len", "max_length", "n_positions")


@dataclass(frozen=True)
class Upstream:
    """What the installed release does with the experts of a family.

    Attributes:
        reads_moe_settings: Whether it builds them from the neuron config's settings for experts
            (NxDI's ``modules/moe_v2.py``); otherwise these have no effect (``modules/moe.py``).
        kernel_cores: Numbers of logical cores for which it runs contexts through a blockwise
            kernel; none on a CPU.
    """

    reads_moe_settings: bool = True
    kernel_cores: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ModelSettings:
    """What the model is: the part of NxDI's ``InferenceConfig`` that matters here.

    Attributes:
        config: The config object itself, for what a family reads of it.
        model_type: Its ``model_type``, if it has one.
        class_modules: Modules that define its class and the classes it derives from.
        has_flag: Whether ``expert_wise_scale`` was set here, where it has no effect.
    """

    config: Any
    model_type: str | None
    class_modules: frozenset[str]
    has_flag: bool

    @property
    def name(self) -> str:
        """The model's type, or the name of its config's class where it has none."""
        return self.model_type or type(self.config).__name__


@dataclass(frozen=True)
class ExpertSettings:
    """How NxDI is to run the quantized experts of a model.

    Attributes:
        parallelism: How they are spread over ranks.
        is_hybrid_sharded: Whether token generation has experts of its own, sharded otherwise.
        is_token_generation_fused: Whether it runs in one kernel (``moe_fused_nki_kernel_enabled``).
        glu_mlp: Whether the experts have a gate.
        capacity_factor: Of the experts, where tokens may be dropped.
        logical_nc_config: Physical cores of a logical one.
        blockwise_logical_nc_config: The same, of ``blockwise_matmul_config``; None without one.
        use_torch_block_wise: Whether blocks of tokens are computed without a kernel.
    """

    parallelism: ExpertParallelism
    is_hybrid_sharded: bool
    is_token_generation_fused: bool
    glu_mlp: bool
    capacity_factor: float | None
    logical_nc_config: int
    blockwise_logical_nc_config: int | None
    use_torch_block_wise: bool


@dataclass(frozen=True)
class Settings:
    """What a model's two configs ask for.

    Attributes:
        flag: ``expert_wise_scale`` as it stands there, whatever its type; False if it is absent.
        neuron_config_classes: Names of the neuron config's class and of those it derives from.
        quantized: ``quantized``: whether NxDI reads ``quantized_checkpoints_path``.
        is_quantized: Whether NxDI builds quantized layers: it does for ``quantized``, for
            ``quantized_mlp_kernel_enabled`` and for ``activation_quantization_type``.
        quantization_type: By its name, whether NxDI holds it as a string or an enumeration.
        quantization_dtype: By its name in lower case, such as ``f8e4m3``; empty if it is absent.
        torch_dtype: The model's dtype, such as ``torch.bfloat16``.
        casts_weights: Whether NxDI casts what it reads to ``torch_dtype``.
        modules_to_not_convert: As it stands there; see :attr:`exclusions`.
        fused_qkv: Whether NxDI fuses a layer's queries, keys and values.
        quantized_checkpoints_path: The folder of the quantized checkpoint, if one is named.
        max_length: Tokens of the longest sequence; 0 if it is not known.
        attention_tp_degree: Ranks over which the heads of attention are spread; None where it is
            not known, or where ranks also share them in other ways.
        model: The model's config; None where the neuron config is looked at alone.
        family: The model's family; None for a dense or unknown model.
        experts: How its experts are run; None where there is no family or nothing is quantized.
        upstream: What the installed release does with this family's experts.
    """

    flag: object
    neuron_config_classes: tuple[str, ...]
    quantized: bool
    is_quantized: bool
    quantization_type: str
    quantization_dtype: str
    torch_dtype: str
    casts_weights: bool
    modules_to_not_convert: object
    fused_qkv: bool
    quantized_checkpoints_path: str | None
    max_length: int
    attention_tp_degree: int | None = None
    model: ModelSettings | None = None
    family: MoEFamily | None = None
    experts: ExpertSettings | None = None
    upstream: Upstream = Upstream()

    @property
    def is_on(self) -> bool:
        """Whether ``expert_wise_scale`` is set."""
        return self.flag is True

    @property
    def keeps_scales_apart(self) -> bool:
        """Whether each expert has a scale of its own: by the flag, or by NxD's own type."""
        return self.is_on or self.quantization_type == EXPERT_WISE

    @property
    def is_fp8(self) -> bool:
        """Whether ``quantization_dtype`` is one of FP8 (``f8e4m3``, ``f8e5m2``)."""
        return self.quantization_dtype.startswith("f8")

    @property
    def exclusions(self) -> tuple[str, ...]:
        """Names of the modules that stay in full precision, ``modules_to_not_convert``."""
        names = self.modules_to_not_convert
        return tuple(names) if isinstance(names, list | tuple) else ()

    @property
    def expanded_exclusions(self) -> tuple[str, ...]:
        """The exclusions as checkpoints and as NxDI's modules are named.

        Raises:
            ConfigurationError: They name a part of what NxDI fuses.
        """
        if self.family is None:
            return self.exclusions
        return expand_exclusions(self.exclusions, self.num_layers, self.family)

    @property
    def num_layers(self) -> int:
        """``num_hidden_layers``; 0 if it is not known."""
        return int(getattr(self._model_config, "num_hidden_layers", None) or 0)

    @property
    def num_attention_heads(self) -> int | None:
        """Query heads; None if it is not known."""
        return first_int(self._model_config, ("num_attention_heads",))

    @property
    def num_key_value_heads(self) -> int | None:
        """Key and value heads; None if it is not known."""
        return first_int(self._model_config, ("num_key_value_heads",))

    @property
    def num_experts(self) -> int | None:
        """Experts of a layer; None for a dense or unknown model."""
        return None if self.family is None else self.family.experts_of(self._model_config)

    @property
    def num_experts_per_tok(self) -> int | None:
        """Experts that a token goes through; None for a dense or unknown model."""
        return None if self.family is None else self.family.experts_per_token_of(self._model_config)

    @property
    def _model_config(self) -> Any:
        return None if self.model is None else self.model.config


def read_settings(
    neuron_config: Any,
    model_config: Any = None,
    families: Sequence[MoEFamily] = (),
    family: MoEFamily | None = None,
) -> Settings:
    """Read what the two configs ask for; nothing is judged.

    Args:
        neuron_config: NxDI's ``NeuronConfig``, or None for a model without one.
        model_config: NxDI's ``InferenceConfig``; None to look at the neuron config alone.
        families: The families that are in force.
        family: The model's family where it is known by other means than its config.
    """
    model = None if model_config is None else _read_model(model_config)
    if model is not None and family is None:
        family = family_of(model.model_type, families, model.class_modules)
    quantized = bool(getattr(neuron_config, "quantized", False))
    is_quantized = quantized or any(
        getattr(neuron_config, name, None)
        for name in ("quantized_mlp_kernel_enabled", "activation_quantization_type")
    )
    experts = None
    if family is not None and is_quantized:
        experts = _read_experts(neuron_config, model_config)
    return Settings(
        flag=getattr(neuron_config, FLAG, False),
        neuron_config_classes=tuple(cls.__name__ for cls in type(neuron_config).__mro__),
        quantized=quantized,
        is_quantized=is_quantized,
        quantization_type=_name_of(neuron_config, "quantization_type", PER_CHANNEL, "value"),
        quantization_dtype=_name_of(neuron_config, "quantization_dtype", "", "name").lower(),
        torch_dtype=str(getattr(neuron_config, "torch_dtype", "torch.float32")),
        casts_weights=getattr(neuron_config, "cast_type", "config") == "config",
        modules_to_not_convert=getattr(neuron_config, "modules_to_not_convert", None),
        fused_qkv=bool(getattr(neuron_config, "fused_qkv", False)),
        quantized_checkpoints_path=getattr(neuron_config, "quantized_checkpoints_path", None),
        max_length=max(getattr(neuron_config, name, None) or 0 for name in _LENGTHS),
        attention_tp_degree=_attention_tp_degree(neuron_config),
        model=model,
        family=family,
        experts=experts,
    )


def _attention_tp_degree(neuron_config: Any) -> int | None:
    # Context and data parallelism of attention leave fewer ranks for the heads.
    others = ("cp_degree", "attention_dp_degree", "ep_degree")
    if any((getattr(neuron_config, name, None) or 1) != 1 for name in others):
        return None
    degree = getattr(neuron_config, "tp_degree", None)
    return degree if type(degree) is int and degree > 0 else None


def _read_model(model_config: Any) -> ModelSettings:
    return ModelSettings(
        config=model_config,
        model_type=getattr(model_config, "model_type", None),
        class_modules=frozenset(cls.__module__ for cls in type(model_config).__mro__),
        has_flag=hasattr(model_config, FLAG),
    )


def _read_experts(neuron_config: Any, model_config: Any) -> ExpertSettings:
    blockwise = getattr(neuron_config, "blockwise_matmul_config", None)
    return ExpertSettings(
        parallelism=read_expert_parallelism(neuron_config),
        is_hybrid_sharded=getattr(neuron_config, "hybrid_sharding_config", None) is not None,
        is_token_generation_fused=bool(
            getattr(model_config, "moe_fused_nki_kernel_enabled", False)
        ),
        glu_mlp=bool(getattr(neuron_config, "glu_mlp", True)),
        capacity_factor=getattr(neuron_config, "capacity_factor", None),
        logical_nc_config=_number_of_cores(neuron_config),
        blockwise_logical_nc_config=None if blockwise is None else _number_of_cores(blockwise),
        use_torch_block_wise=bool(getattr(blockwise, "use_torch_block_wise", False)),
    )


def _name_of(neuron_config: Any, setting: str, default: str, attribute: str) -> str:
    """A setting by its name; most releases hold strings, some a member of an enumeration."""
    value = getattr(neuron_config, setting, default)
    return str(getattr(value, attribute, value))


def _number_of_cores(holder: Any) -> int:
    value = getattr(holder, "logical_nc_config", 2)
    if isinstance(value, Mapping):
        # A member of an enumeration, as NxDI's ``to_json_string`` writes it and does not read it.
        value = value["_value_"]
    return int(getattr(value, "value", value))
