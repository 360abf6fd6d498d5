"""What differs between families of mixture-of-experts models: key names and module names.

A family is data. Nothing here imports torch or NxDI, so a plugin can declare one at no cost.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nxdi_expertscale.errors import ConfigurationError
from nxdi_expertscale.families.config_fields import first_int
from nxdi_expertscale.families.limits import Limit, ReachedLimit, find_reached
from nxdi_expertscale.families.linears import RenamedLinear, attention_linears
from nxdi_expertscale.families.tensor_names import TensorNames
from nxdi_expertscale.hooking.module_names import ANY_PACKAGE

GATE_UP = "gate_up_proj"
DOWN = "down_proj"

_USUAL_CONFIG_PATH = ("text_config",)


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
        whole_norm: Whether the attention normalizes queries and keys over all heads together.
    """

    head_norm: bool
    normalizes_top_k: bool
    whole_norm: bool = False


@dataclass(frozen=True)
class MoEFamily:
    """The names of one family of models, in its checkpoints and in NxDI's modules.

    Paths are written as NxDI writes them, without the ``model.`` that Hugging Face puts before
    them, and with ``{layer}`` where the layer's number stands.

    Attributes:
        name: The family's name in messages and tables.
        model_types: Values of ``model_type`` in ``config.json`` that belong to it.
        converter: NxDI's function that fuses a state dict of this family, as
            ``"package.module:function"``; the seam that is patched. That of a contributed model,
            which each user puts into a package of his own, as ``"*.module:function"``: its file
            and the function in it.
        experts: Path of a layer's experts in a checkpoint, ``layers.{layer}.mlp.experts``.
        router: Path of a layer's router in a checkpoint, ``layers.{layer}.mlp.gate``.
        expert_mlps: Path of a layer's fused experts among NxDI's modules.
        renamed_linears: Linear layers that have other names among NxDI's modules than in a
            checkpoint; those of attention, unless the family's are its own.
        embeddings: Path of the token embeddings; a table and no linear layer, never converted.
        final_norm: Path of the norm before the output layer.
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
        own_loader: The method of the converter's module, ``"Class.checkpoint_loader_fn"``, that
            reads the model's own checkpoint at each load and quantizes it in memory; NxDI's is
            called in its place with the flag on.
        full_precision: Modules beside the router that NxDI cannot load quantized, because the
            converter has no place for their scales; a part of their path in a checkpoint and
            among NxDI's modules.
        renames: Paths in a checkpoint, each with the one that NxDI's modules have, of what the
            converter does not rename, or leaves the scale of: a weight, its scale and its bias
            come to the converter under the latter.
        config_path: Where a ``config.json`` keeps the fields of the language model, one within
            the other; those that there are.
        config_modules: Modules beside the converter's that define a config of its models, which is
            known by them where it has no ``model_type``; ``*.module`` for one in any package.
        layer_types: Field of the model's config that says of which kind each layer is, where they
            differ in shape.
        num_experts: Attributes of the model's config that may hold the number of experts.
        num_experts_per_tok: Attributes that may hold the number of experts of a token.
        intermediate_size: Attributes that may hold the experts' intermediate size.
        limits: What NxDI computes wrongly, or cannot load, of some of its models.
        decoder: What is particular to its layers; None where ``evaluate`` cannot compute them.
    """

    name: str
    model_types: tuple[str, ...]
    converter: str
    experts: str = "layers.{layer}.mlp.experts"
    router: str = "layers.{layer}.mlp.gate"
    expert_mlps: str = "layers.{layer}.mlp.expert_mlps"
    renamed_linears: tuple[RenamedLinear, ...] = attention_linears(
        "layers.{layer}.self_attn", "layers.{layer}.self_attn"
    )
    embeddings: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    prefixes: tuple[str, ...] = ("model.", "")
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stacked: Stacking | None = None
    converter_reads_stacked: bool = False
    converter_knows_scales: bool = False
    own_loader: str | None = None
    full_precision: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    config_modules: tuple[str, ...] = ()
    layer_types: str = "layer_types"
    config_path: tuple[str, ...] = _USUAL_CONFIG_PATH
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    num_experts_per_tok: tuple[str, ...] = ("num_experts_per_tok",)
    intermediate_size: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    limits: tuple[Limit, ...] = ()
    decoder: DecoderTraits | None = None

    def __post_init__(self) -> None:
        module, _, function = self.converter.partition(":")
        path = module.removeprefix(ANY_PACKAGE)
        if not all(part.isidentifier() for part in (*path.split("."), *function.split("."))):
            raise ConfigurationError(
                f"family {self.name!r}: converter must be 'package.module:function' or "
                f"'*.module:function', not {self.converter!r}"
            )
        for field in ("experts", "router", "expert_mlps"):
            if "{layer}" not in getattr(self, field):
                raise ConfigurationError(
                    f"family {self.name!r}: {field} must say where the layer's number stands, as "
                    f"in 'layers.{{layer}}.mlp', and is {getattr(self, field)!r}"
                )

    @property
    def module(self) -> str:
        """NxDI's module that defines the converter; ``*.module`` where it may be in any package."""
        return self.converter.partition(":")[0]

    @property
    def function(self) -> str:
        """The converter's name within its module, such as ``Class.convert``."""
        return self.converter.partition(":")[2]

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

    def router_module(self, layer: int) -> str:
        """Path of a layer's router among NxDI's modules (NxD's ``modules/moe/model.py``)."""
        return f"{self.expert_mlps.format(layer=layer).rpartition('.')[0]}.router.linear_router"

    def fused_key(self, layer: int, fused: str, suffix: str = "weight") -> str:
        """Name of a fused tensor in NxDI's state dict; ``fused`` is a key of :attr:`fused`."""
        return f"{self.expert_mlps.format(layer=layer)}.mlp_op.{fused}.{suffix}"

    def stacked_key(self, layer: int, fused: str) -> str:
        """Name of the tensor with all experts of a layer; ``fused`` is a key of :attr:`fused`."""
        return f"{self.experts.format(layer=layer)}.{fused}"

    @cached_property
    def names(self) -> TensorNames:
        """Reads the names of this family's tensors and modules."""
        return TensorNames(
            experts=self.experts,
            router=self.router,
            expert_mlps=self.expert_mlps,
            projections=self.projections,
            stacked=() if self.stacked is None else tuple(self.fused),
            prefixes=self.prefixes,
            linears=self.renamed_linears,
            renames=self.renames,
        )

    def renamed(self, name: str) -> str:
        """The name that NxDI's modules have for a checkpoint's tensor, as far as it is declared."""
        return self.names.rename(name)

    def language_model_of(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The fields of the language model, from what a ``config.json`` holds."""
        for part in self.config_path:
            nested = config.get(part)
            config = nested if isinstance(nested, Mapping) else config
        return config

    def experts_of(self, config: Any) -> int | None:
        """Number of experts in a layer, from a model's config; None if it has none."""
        return first_int(config, self.num_experts)

    def intermediate_size_of(self, config: Any) -> int | None:
        """Width of an expert, from a model's config; None if it does not say."""
        return first_int(config, self.intermediate_size)

    def experts_per_token_of(self, config: Any) -> int | None:
        """Number of experts that a token goes through, from a model's config."""
        return first_int(config, self.num_experts_per_tok)

    def limits_of(self, config: Any) -> tuple[ReachedLimit, ...]:
        """What NxDI computes wrongly, or cannot load, of the model with this config."""
        if isinstance(config, Mapping) and self.config_path != _USUAL_CONFIG_PATH:
            config = self.language_model_of(config)
        return find_reached(self.limits, config)
