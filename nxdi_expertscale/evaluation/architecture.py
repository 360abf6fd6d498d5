"""How a model computes, for the decoder: what is needed of its config, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from nxdi_expertscale.checkpoint.read.config import ModelConfig
from nxdi_expertscale.errors import CheckpointError, damaged, parameter
from nxdi_expertscale.families.declaration import MoEFamily

EMBEDDINGS = "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "norm.weight"

MAX_WIDTH = 1 << 18
"""Wider activations than any model has: some 2048 tokens of them take 2 GB in float32."""

MAX_VOCABULARY = 1 << 22
"""More tokens than any model knows: the logits of 128 tokens take 2 GB in float32."""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Architecture:
    """Everything that the decoder's computation depends on, beside the weights.

    The names are Hugging Face's where a config has the field.

    Attributes:
        family: The names of its tensors.
        num_hidden_layers: Number of layers.
        dense_layers: Those of them that have a dense MLP in place of experts.
        hidden_size: Width of the residual stream.
        vocab_size: Number of tokens.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        head_dim: Width of a head.
        head_norm: Whether queries and keys are normalized for each head, as Qwen3 does.
        whole_norm: Whether they are normalized over all heads together, as OLMoE does.
        attention_bias: Whether the projections of the attention have a bias.
        num_experts: Number of experts in a layer.
        num_experts_per_tok: Number of experts that a token is routed to.
        moe_intermediate_size: Width of an expert between its projections.
        intermediate_size: Width of a dense MLP between its projections; 0 where there is none.
        norm_topk_prob: Whether the routing weights of a token are made to add up to one.
        rms_norm_eps: Epsilon of the RMS norms.
        rope_theta: Base of the rotary embedding.
        tie_word_embeddings: Whether the embeddings are the output layer's weight too.
    """

    family: MoEFamily
    num_hidden_layers: int
    dense_layers: frozenset[int]
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    head_norm: bool
    whole_norm: bool
    attention_bias: bool
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    intermediate_size: int
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each weight that the computation takes."""
        hidden, family = self.hidden_size, self.family
        yield EMBEDDINGS, (self.vocab_size, hidden)
        yield FINAL_NORM, (hidden,)
        if not self.tie_word_embeddings:
            yield LM_HEAD, (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            yield from self._attention_shapes(f"layers.{layer}")
            if layer in self.dense_layers:
                for name in family.projections:
                    shape = self._mlp_shape(name, self.intermediate_size)
                    yield f"layers.{layer}.mlp.{name}.weight", shape
                continue
            yield family.router_key(layer), (self.num_experts, hidden)
            for expert in range(self.num_experts):
                for name in family.projections:
                    shape = self._mlp_shape(name, self.moe_intermediate_size)
                    yield family.expert_key(layer, expert, name), shape

    def _attention_shapes(self, path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden = self.hidden_size
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        yield f"{path}.input_layernorm.weight", (hidden,)
        yield f"{path}.post_attention_layernorm.weight", (hidden,)
        for name, shape in (
            ("q_proj", (queries, hidden)),
            ("k_proj", (keys, hidden)),
            ("v_proj", (keys, hidden)),
            ("o_proj", (hidden, queries)),
        ):
            yield f"{path}.self_attn.{name}.weight", shape
            if self.attention_bias:
                yield f"{path}.self_attn.{name}.bias", shape[:1]
        if self.head_norm:
            yield f"{path}.self_attn.q_norm.weight", (self.head_dim,)
            yield f"{path}.self_attn.k_norm.weight", (self.head_dim,)
        if self.whole_norm:
            yield f"{path}.self_attn.q_norm.weight", (queries,)
            yield f"{path}.self_attn.k_norm.weight", (keys,)

    def _mlp_shape(self, projection: str, inner: int) -> tuple[int, int]:
        hidden = self.hidden_size
        return (hidden, inner) if projection == self.family.down else (inner, hidden)


def derive_architecture(config: ModelConfig, family: MoEFamily) -> Architecture:
    """Derive from a model's config how it computes.

    Args:
        config: The config.
        family: The model's family.

    Raises:
        CheckpointError: A setting is missing, or is one that the decoder does not have.
    """
    traits = family.decoder
    if traits is None:
        raise CheckpointError(
            f"{config.where}: a model of the family {family.name} cannot be computed here; the "
            f"errors of its weights are measured by verify with {parameter('against')}"
        )
    _check_supported(config, "rope_scaling", config.rope_type, "default")
    _check_supported(config, "hidden_act", config.hidden_act, "silu")
    _check_supported(config, "clip_qkv", config.clip_qkv, None)
    heads = _required(config, "num_attention_heads", config.num_attention_heads)
    norm_topk_prob = config.norm_topk_prob
    mlp_only_layers = frozenset(config.mlp_only_layers)
    dense_layers = frozenset(
        layer
        for layer in range(config.num_hidden_layers)
        if layer in mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    )
    architecture = Architecture(
        family=family,
        num_hidden_layers=config.num_hidden_layers,
        dense_layers=dense_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or config.hidden_size // heads,
        head_norm=traits.head_norm,
        whole_norm=traits.whole_norm,
        attention_bias=config.attention_bias,
        num_experts=config.num_experts,
        num_experts_per_tok=_required(config, "num_experts_per_tok", config.num_experts_per_tok),
        moe_intermediate_size=config.moe_intermediate_size,
        intermediate_size=(
            _required(config, "intermediate_size", config.intermediate_size) if dense_layers else 0
        ),
        norm_topk_prob=traits.normalizes_top_k if norm_topk_prob is None else norm_topk_prob,
        rms_norm_eps=_required(config, "rms_norm_eps", config.rms_norm_eps),
        rope_theta=_required(config, "rope_theta", config.rope_theta),
        tie_word_embeddings=config.tie_word_embeddings,
    )
    _check_heads(architecture, config.where)
    _check_sizes(architecture, config.where)
    return architecture


def context_length(config: ModelConfig) -> int:
    """Number of tokens up to which every token attends to all tokens before it.

    Raises:
        CheckpointError: The config does not say.
    """
    limits = (config.max_position_embeddings, config.sliding_window)
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise damaged(config.where, "has no max_position_embeddings")
    return min(known)


def _required(config: ModelConfig, name: str, value: _Value | None) -> _Value:
    if value is None:
        raise damaged(config.where, f"has no {name}")
    return value


def _check_heads(model: Architecture, where: str) -> None:
    if model.num_attention_heads % model.num_key_value_heads:
        raise damaged(
            where,
            f"num_attention_heads is {model.num_attention_heads}, no multiple of "
            f"num_key_value_heads, which is {model.num_key_value_heads}",
        )
    if model.head_dim < 2 or model.head_dim % 2:
        raise damaged(
            where,
            f"a head has {model.head_dim} channels, and a rotary embedding turns pairs of them",
        )


def _check_sizes(model: Architecture, where: str) -> None:
    """Check that what is computed from a token is no larger than with any real model."""
    widths = {
        "hidden_size": model.hidden_size,
        "moe_intermediate_size": model.moe_intermediate_size,
        "intermediate_size": model.intermediate_size,
        "num_attention_heads * head_dim": model.num_attention_heads * model.head_dim,
    }
    for name, width in widths.items():
        if width > MAX_WIDTH:
            raise damaged(where, f"{name} is {width}, more than any model has")
    if model.vocab_size > MAX_VOCABULARY:
        raise damaged(where, f"vocab_size is {model.vocab_size}, more than any model has")


def _check_supported(config: ModelConfig, name: str, value: object, supported: object) -> None:
    if value != supported:
        raise CheckpointError(
            f"{config.where}: {name} is {value!r}, which the decoder on a CPU does not compute; it "
            f"has {supported!r} alone"
        )
