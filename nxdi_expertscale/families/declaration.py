"""What differs between families of mixture-of-experts models: key names and module names.

A family is data. Nothing here imports torch or NxDI, so a plugin can declare one at no cost.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nxdi_expertscale.errors import CheckpointError, ConfigurationError

GATE_UP = "gate_up_proj"
DOWN = "down_proj"

_NUMBER = "(?:0|[1-9][0-9]{0,8})"
"""A number as models write it: ASCII, without leading zeros, and not of a million digits."""


@dataclass(frozen=True)
class ExpertTensor:
    """The place of one expert's tensor, read from its name in a checkpoint."""

    layer: int
    expert: int
    projection: str
    """The family's own name of the projection: ``gate_proj``, ``w1``, …"""
    suffix: str
    """What follows the projection: ``weight``, ``scale``, ``weight_scale``, …"""


class Stacking(enum.Enum):
    """How one tensor holds all experts of a layer.

    The tensors are ``gate_up_proj`` (gate, then up, along the outputs) and ``down_proj``, beneath
    the path of the experts and without ``.weight``.
    """

    OUTPUTS_FIRST = "[E, out, in]"
    """An expert's part is as a linear layer's weight: Hugging Face's Qwen3.5 MoE."""
    INPUTS_FIRST = "[E, in, out]"
    """An expert's part is transposed, as NxDI's own weights are: Llama 4."""


@dataclass(frozen=True)
class DecoderTraits:
    """What is particular to a family's layers, beside the names of their tensors.

    For the reference on a CPU, ``evaluation.decoder``, which has what all share.

    Attributes:
        head_norm: Whether the attention normalizes queries and keys for each head.
        normalizes_top_k: Whether the routing weights of a token are made to add up to one, where
            a config does not say so itself (``norm_topk_prob``).
    """

    head_norm: bool
    normalizes_top_k: bool


@dataclass(frozen=True)
class MoEFamily:
    """The names of one family of models, in its checkpoints and in NxDI's modules.

    Paths are written as NxDI writes them, without the ``model.`` that Hugging Face puts before
    them, and with ``{layer}`` where the layer's number stands.

    Attributes:
        name: The family's name in messages and tables.
        model_types: Values of ``model_type`` in ``config.json`` that belong to it.
        converter: NxDI's function that fuses a state dict of this family, as
            ``"package.module:function"``; the seam that is patched.
        experts: Path of a layer's experts in a checkpoint, ``layers.{layer}.mlp.experts``.
        router: Path of a layer's router in a checkpoint, ``layers.{layer}.mlp.gate``.
        expert_mlps: Path of a layer's fused experts among NxDI's modules.
        embeddings: Path of the token embeddings; a table and no linear layer, never converted.
        head: Path of the output layer.
        prefixes: What may stand before a path in a checkpoint.
        gate: Name of the gate projection, ``[I, H]`` in a checkpoint.
        up: Name of the up projection, ``[I, H]``.
        down: Name of the down projection, ``[H, I]``.
        stacked: How checkpoints hold all experts of a layer in one tensor, where they may.
        converter_reads_stacked: Whether the converter takes the experts stacked, and not one by
            one. They are stacked for it when they are loaded.
        converter_knows_scales: Whether the converter treats scales, though not those of experts
            that are named one by one. Of another one that does, it is not known what it makes.
        full_precision: Modules beside the router that NxDI cannot load quantized, because the
            converter has no place for their scales; a part of their path in a checkpoint and
            among NxDI's modules.
        num_experts: Attributes of the model's config that may hold the number of experts.
        num_experts_per_tok: Attributes that may hold the number of experts of a token.
        intermediate_size: Attributes that may hold the experts' intermediate size.
        decoder: What is particular to its layers; None where ``evaluate`` cannot compute them.
    """

    name: str
    model_types: tuple[str, ...]
    converter: str
    experts: str = "layers.{layer}.mlp.experts"
    router: str = "layers.{layer}.mlp.gate"
    expert_mlps: str = "layers.{layer}.mlp.expert_mlps"
    embeddings: str = "embed_tokens"
    head: str = "lm_head"
    prefixes: tuple[str, ...] = ("model.", "")
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stacked: Stacking | None = None
    converter_reads_stacked: bool = False
    converter_knows_scales: bool = False
    full_precision: tuple[str, ...] = ()
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    num_experts_per_tok: tuple[str, ...] = ("num_experts_per_tok",)
    intermediate_size: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    decoder: DecoderTraits | None = None

    def __post_init__(self) -> None:
        module, _, function = self.converter.partition(":")
        if not module or not all(part.isidentifier() for part in function.split(".")):
            raise ConfigurationError(
                f"family {self.name!r}: converter must be 'package.module:function', not "
                f"{self.converter!r}"
            )
        for field in ("experts", "router", "expert_mlps"):
            if "{layer}" not in getattr(self, field):
                raise ConfigurationError(
                    f"family {self.name!r}: {field} must say where the layer's number stands, as "
                    f"in 'layers.{{layer}}.mlp', and is {getattr(self, field)!r}"
                )

    @property
    def projections(self) -> tuple[str, str, str]:
        """The names of gate, up and down, in this order."""
        return (self.gate, self.up, self.down)

    @property
    def fused(self) -> Mapping[str, tuple[str, ...]]:
        """For each of NxDI's fused weights, the projections it is made of, in their order."""
        return {GATE_UP: (self.gate, self.up), DOWN: (self.down,)}

    def paths(self, path: str) -> tuple[str, ...]:
        """The names that a path may have in a checkpoint."""
        return tuple(f"{prefix}{path}" for prefix in self.prefixes)

    def expert_key(self, layer: int, expert: int, projection: str, suffix: str = "weight") -> str:
        """Name of one expert's tensor in a checkpoint."""
        return f"{self.experts.format(layer=layer)}.{expert}.{projection}.{suffix}"

    def router_key(self, layer: int, suffix: str = "weight") -> str:
        """Name of a tensor of a layer's router in a checkpoint."""
        return f"{self.router.format(layer=layer)}.{suffix}"

    def fused_key(self, layer: int, fused: str, suffix: str = "weight") -> str:
        """Name of a fused tensor in NxDI's state dict; ``fused`` is a key of :attr:`fused`."""
        return f"{self.expert_mlps.format(layer=layer)}.mlp_op.{fused}.{suffix}"

    def stacked_key(self, layer: int, fused: str) -> str:
        """Name of the tensor with all experts of a layer; ``fused`` is a key of :attr:`fused`."""
        return f"{self.experts.format(layer=layer)}.{fused}"

    @cached_property
    def _expert_pattern(self) -> re.Pattern[str]:
        path = re.escape(self.experts).replace(re.escape("{layer}"), rf"(?P<layer>{_NUMBER})")
        names = "|".join(re.escape(name) for name in self.projections)
        return re.compile(
            rf"(?:^|\.){path}\.(?P<expert>{_NUMBER})\.(?P<projection>{names})\.(?P<suffix>\w+)\Z"
        )

    @cached_property
    def _router_pattern(self) -> re.Pattern[str]:
        path = re.escape(self.router).replace(re.escape("{layer}"), rf"(?P<layer>{_NUMBER})")
        return re.compile(rf"(?:^|\.){path}\.(?P<suffix>\w+)\Z")

    def parse_expert_key(self, key: str) -> ExpertTensor | None:
        """Read the place of an expert's tensor from its name; None if it is another tensor's."""
        match = self._expert_pattern.search(key)
        if match is None:
            return None
        return ExpertTensor(
            int(match["layer"]), int(match["expert"]), match["projection"], match["suffix"]
        )

    @cached_property
    def _stacked_pattern(self) -> re.Pattern[str]:
        path = re.escape(self.experts).replace(re.escape("{layer}"), rf"(?P<layer>{_NUMBER})")
        return re.compile(rf"(?:^|\.){path}\.(?P<fused>{'|'.join(self.fused)})\Z")

    def parse_stacked_key(self, key: str) -> tuple[int, str] | None:
        """The layer, and the key of :attr:`fused`, of a tensor with all experts of a layer."""
        match = self._stacked_pattern.search(key) if self.stacked is not None else None
        return (int(match["layer"]), match["fused"]) if match else None

    def is_router_key(self, key: str) -> bool:
        """Whether a name is that of a router's tensor."""
        return self._router_pattern.search(key) is not None

    def excludes(self, path: str, exclusions: Iterable[str]) -> bool:
        """Whether ``modules_to_not_convert`` leaves a module of a checkpoint as it is.

        A name holds for every module whose dotted path contains it, as in NxD
        (``quantization/quantization_utils.py`` for checkpoints, ``quantization/quantize.py`` for
        modules). An expert's module is decided with all of its layer's.

        Args:
            path: The module's path in a checkpoint, with or without ``model.``, such as
                ``model.layers.0.self_attn.q_proj``.
            exclusions: Names of either world, with or without ``model.``.

        Raises:
            ConfigurationError: A name is that of a part of what NxDI fuses, as one expert is.
        """
        names = tuple(exclusions)
        expert = self.parse_expert_key(f"{path}.weight")
        if expert is None:
            return any(_is_part_of(name, path) for name in names)
        if self.excludes_experts(expert.layer, names):
            return True
        for name in names:
            if _is_part_of(name, path):
                raise self._part_of_fused(name, expert.layer)
        return False

    def excludes_experts(self, layer: int, exclusions: Iterable[str]) -> bool:
        """Whether ``modules_to_not_convert`` keeps a layer's experts in full precision.

        NxDI fuses a layer's experts in one dtype, so it keeps all of them or none. A name may be
        the checkpoint's (``layers.0.mlp.experts``) or that of NxDI's module
        (``layers.0.mlp.expert_mlps``), or a part of either.

        Raises:
            ConfigurationError: A name is that of a part of what NxDI fuses, as ``down_proj`` is.
        """
        names = tuple(exclusions)
        experts = f"model.{self.experts.format(layer=layer)}."
        modules = f"{self.expert_mlps.format(layer=layer)}.mlp_op."
        if any(_is_part_of(name, path) for name in names for path in (experts, modules)):
            return True
        sides = (
            {part: [n for n in names if _is_part_of(n, f".{part}")] for part in self.projections},
            # A name such as "gate" is a router's in a checkpoint, and no more than a syllable here.
            {part: [n for n in names if n.rpartition(".")[2] == part] for part in self.fused},
        )
        for named in sides:
            if all(named.values()):
                return True
            for found in named.values():
                if found:
                    raise self._part_of_fused(found[0], layer)
        return False

    def _part_of_fused(self, name: str, layer: int) -> ConfigurationError:
        return ConfigurationError(
            f"modules_to_not_convert: {name!r} names a part of what NxDI fuses, and it fuses a "
            "layer's experts in one dtype; name all experts of the layer: "
            f"{self.experts.format(layer=layer)!r}"
        )

    def in_both_worlds(self, exclusions: Collection[str], layers: int) -> tuple[str, ...]:
        """Exclusions that say the same to what reads checkpoints and to what converts modules.

        To the names, without ``model.``, are added those of each layer's experts that stay in
        full precision: ``layers.0.mlp.experts`` and ``layers.0.mlp.expert_mlps``.

        Args:
            exclusions: Names of either world.
            layers: The model's number of layers.

        Raises:
            ConfigurationError: A name is that of a part of what NxDI fuses.
        """
        names = [name.removeprefix("model.") for name in exclusions]
        for layer in range(layers):
            if self.excludes_experts(layer, exclusions):
                names.append(self.experts.format(layer=layer))
                names.append(self.expert_mlps.format(layer=layer))
        return tuple(dict.fromkeys(names))

    def layer_of_module(self, module: str) -> int | None:
        """The layer that a module's dotted path lies in, if it is one of the fused experts."""
        match = self._module_pattern.search(module)
        return int(match["layer"]) if match else None

    @cached_property
    def _module_pattern(self) -> re.Pattern[str]:
        path = re.escape(self.expert_mlps).replace(re.escape("{layer}"), rf"(?P<layer>{_NUMBER})")
        return re.compile(rf"(?:^|\.){path}(?:\.|$)")

    def experts_of(self, config: Any) -> int | None:
        """Number of experts in a layer, from a model's config; None if it has none."""
        return _first_int(config, self.num_experts)

    def intermediate_size_of(self, config: Any) -> int | None:
        """Width of an expert, from a model's config; None if it does not say."""
        return _first_int(config, self.intermediate_size)

    def experts_per_token_of(self, config: Any) -> int | None:
        """Number of experts that a token goes through, from a model's config."""
        return _first_int(config, self.num_experts_per_tok)


def _is_part_of(name: str, path: str) -> bool:
    bare = name.removeprefix("model.")
    return name in path or (bare != "" and bare in path)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a ``config.json`` that describes the language model.

    Hugging Face's models that also see keep it in ``text_config``.
    """
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that the embeddings are the output layer's weight too."""
    parts = (config, language_config(config))
    return any(part.get("tie_word_embeddings") is True for part in parts)


def _first_int(config: Any, names: Iterable[str]) -> int | None:
    if isinstance(config, Mapping):
        config = language_config(config)
    for name in names:
        value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


QWEN3_MOE = MoEFamily(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    converter=(
        "neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe"
        ":convert_qwen3_moe_hf_to_neuron_state_dict"
    ),
    stacked=Stacking.OUTPUTS_FIRST,
    decoder=DecoderTraits(head_norm=True, normalizes_top_k=False),
)

MIXTRAL = MoEFamily(
    name="mixtral",
    model_types=("mixtral",),
    converter=(
        "neuronx_distributed_inference.models.mixtral.modeling_mixtral"
        ":convert_mixtral_to_neuron_state_dict"
    ),
    experts="layers.{layer}.block_sparse_moe.experts",
    router="layers.{layer}.block_sparse_moe.gate",
    gate="w1",
    up="w3",
    down="w2",
    num_experts=("num_local_experts",),
    intermediate_size=("intermediate_size",),
    decoder=DecoderTraits(head_norm=False, normalizes_top_k=True),
)

_LLAMA4 = "neuronx_distributed_inference.models.llama4.modeling_llama4_text"

LLAMA4 = MoEFamily(
    name="llama4",
    model_types=("llama4", "llama4_text"),
    converter=f"{_LLAMA4}:NeuronLlama4TextForCausalLM.convert_hf_to_neuron_state_dict",
    experts="language_model.model.layers.{layer}.feed_forward.experts",
    router="language_model.model.layers.{layer}.feed_forward.router",
    expert_mlps="layers.{layer}.feed_forward.moe.expert_mlps",
    embeddings="language_model.model.embed_tokens",
    head="language_model.lm_head",
    prefixes=("",),
    stacked=Stacking.INPUTS_FIRST,
    converter_reads_stacked=True,
    converter_knows_scales=True,
    full_precision=("lm_head", "shared_expert", "vision_model", "multi_modal_projector"),
    num_experts=("num_local_experts",),
    intermediate_size=("intermediate_size",),
)

BUILT_IN: tuple[MoEFamily, ...] = (QWEN3_MOE, MIXTRAL, LLAMA4)


@dataclass(frozen=True)
class UnsupportedModel:
    """A mixture-of-experts model of NxDI that cannot have one FP8 scale per expert.

    Attributes:
        model_types: Values of ``model_type`` in ``config.json``.
        module: NxDI's module that defines its config.
        reason: Why, and what to do instead.
    """

    model_types: tuple[str, ...]
    module: str
    reason: str


UNSUPPORTED: tuple[UnsupportedModel, ...] = (
    UnsupportedModel(
        model_types=("dbrx",),
        module="neuronx_distributed_inference.models.dbrx.modeling_dbrx",
        reason=(
            "NxDI's converter for DBRX copies weights by name and drops every scale, so it loads "
            "no quantized DBRX at all; run it in bfloat16"
        ),
    ),
    UnsupportedModel(
        model_types=("gpt_oss",),
        module="neuronx_distributed_inference.models.gpt_oss.modeling_gpt_oss",
        reason=(
            "gpt-oss is quantized already: its experts are MXFP4, with a scale for every 32 "
            "values, and NxDI reads them in no other form; run the original checkpoint with "
            "quantized=False"
        ),
    ),
)


def family_of(model_type: str | None, families: Sequence[MoEFamily]) -> MoEFamily | None:
    """The family that a ``model_type`` belongs to, or None."""
    return next((family for family in families if model_type in family.model_types), None)


def why_unsupported(model_type: str | None, modules: Iterable[str] = ()) -> str | None:
    """Why a model cannot have one scale per expert, if that is known.

    Args:
        model_type: The model's type, if it has one.
        modules: Modules that define its config, by which it is known where it has no type.
    """
    for model in UNSUPPORTED:
        if model_type in model.model_types or (not model_type and model.module in modules):
            return model.reason
    return None


def require_family(model_type: str | None, families: Sequence[MoEFamily], where: str) -> MoEFamily:
    """The family that a ``model_type`` belongs to.

    Raises:
        CheckpointError: No family has this model type; the message says why, or lists those that
            exist.
    """
    family = family_of(model_type, families)
    if family is None:
        reason = why_unsupported(model_type)
        if reason is not None:
            raise CheckpointError(f"{where}: model_type {model_type!r} is not supported: {reason}")
        known = ", ".join(sorted(_model_types(families))) or "none"
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not a mixture-of-experts model that is "
            f"supported; supported are: {known}"
        )
    return family


def _model_types(families: Sequence[MoEFamily]) -> Iterator[str]:
    for family in families:
        yield from family.model_types
