"""The decoder that Qwen3 MoE and Mixtral share, in plain torch: pure functions on weights.

It is the reference that quantized weights are measured against. It needs no transformers, so it
runs on any machine and with any release of it, and it takes each weight by its name when it is
needed, so a layer's experts are never in memory together. It agrees with Hugging Face's own
``Qwen3MoeForCausalLM`` and ``MixtralForCausalLM`` to rounding (``tests/unit/test_decoder.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from nxdi_expertscale.checkpoint.read.config import layers_in, size_in
from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.families.declaration import MoEFamily

Weights = Callable[[str], torch.Tensor]
"""Gives a weight as float32 by its name in a checkpoint, without Hugging Face's ``model.``."""

EMBEDDINGS = "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "norm.weight"


@dataclass(frozen=True)
class Architecture:
    """What a model's ``config.json`` says of its computation.

    Attributes:
        family: The names of its tensors.
        layers: Number of layers.
        dense_layers: Those of them that have one plain MLP in place of experts.
        hidden_size: Width of the residual stream.
        vocabulary: Number of tokens.
        heads: Number of query heads.
        key_value_heads: Number of key and value heads.
        head_size: Width of a head.
        head_norm: Whether queries and keys are normalized for each head, as Qwen3 does.
        attention_bias: Whether the projections of the attention have a bias.
        experts: Number of experts in a layer.
        expert_size: Inner width of an expert.
        dense_size: Inner width of a plain MLP; 0 where there is none.
        experts_per_token: How many of them a token goes through.
        normalizes_top_k: Whether the routing weights of a token are made to add up to one.
        epsilon: Of the RMS norms.
        rope_theta: Base of the rotary embedding.
        tied: Whether the embeddings are the output's weight too.
    """

    family: MoEFamily
    layers: int
    dense_layers: frozenset[int]
    hidden_size: int
    vocabulary: int
    heads: int
    key_value_heads: int
    head_size: int
    head_norm: bool
    attention_bias: bool
    experts: int
    expert_size: int
    dense_size: int
    experts_per_token: int
    normalizes_top_k: bool
    epsilon: float
    rope_theta: float
    tied: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights that the computation takes."""
        hidden, family = self.hidden_size, self.family
        queries, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        found: dict[str, tuple[int, ...]] = {
            EMBEDDINGS: (self.vocabulary, hidden),
            FINAL_NORM: (hidden,),
        }
        if not self.tied:
            found[LM_HEAD] = (self.vocabulary, hidden)
        for layer in range(self.layers):
            path = f"layers.{layer}"
            found[f"{path}.input_layernorm.weight"] = (hidden,)
            found[f"{path}.post_attention_layernorm.weight"] = (hidden,)
            projections = {
                "q_proj": (queries, hidden),
                "k_proj": (keys, hidden),
                "v_proj": (keys, hidden),
                "o_proj": (hidden, queries),
            }
            for name, shape in projections.items():
                found[f"{path}.self_attn.{name}.weight"] = shape
                if self.attention_bias:
                    found[f"{path}.self_attn.{name}.bias"] = shape[:1]
            if self.head_norm:
                found[f"{path}.self_attn.q_norm.weight"] = (self.head_size,)
                found[f"{path}.self_attn.k_norm.weight"] = (self.head_size,)
            if layer in self.dense_layers:
                for name in family.projections:
                    found[f"{path}.mlp.{name}.weight"] = self._mlp(name, self.dense_size)
                continue
            found[family.router_key(layer)] = (self.experts, hidden)
            for expert in range(self.experts):
                for name in family.projections:
                    key = family.expert_key(layer, expert, name)
                    found[key] = self._mlp(name, self.expert_size)
        return found

    def _mlp(self, projection: str, inner: int) -> tuple[int, int]:
        hidden = self.hidden_size
        return (hidden, inner) if projection == self.family.down else (inner, hidden)


def read_architecture(config: Mapping[str, Any], family: MoEFamily, where: str) -> Architecture:
    """Read from a ``config.json`` how a model computes.

    Args:
        config: What the file holds, in the words of transformers 4 or 5.
        family: The model's family.
        where: The file's name, for messages.

    Raises:
        CheckpointError: A setting is missing, or is one that this decoder does not have.
    """
    traits = family.decoder
    if traits is None:
        raise CheckpointError(
            f"{where}: a model of the family {family.name} cannot be computed here; the errors of "
            "its weights are measured by 'nxdi-expertscale verify DST --against SRC'"
        )
    # transformers 5 writes rope_parameters, releases before it rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{where}: rope_parameters is {rope!r}; download it again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    _refuse(where, "rope_scaling", kind, allowed=("default",))
    _refuse(where, "hidden_act", config.get("hidden_act", "silu"), allowed=("silu",))
    experts, per_token = family.experts_of(config), family.experts_per_token_of(config)
    inner = family.intermediate_size_of(config)
    if not (experts and per_token and inner) or min(experts, per_token, inner) < 1:
        raise CheckpointError(
            f"{where}: does not say how many experts a layer has, how wide they are, and how "
            "many of them a token goes through; download it again"
        )
    layers = layers_in(config, where)
    hidden, heads = (
        size_in(config, name, where) for name in ("hidden_size", "num_attention_heads")
    )
    step = size_in(config, "decoder_sparse_step", where, default=1)
    plain = config.get("mlp_only_layers") or []
    if not isinstance(plain, list):
        raise CheckpointError(f"{where}: mlp_only_layers is {plain!r}; download it again")
    dense = {n for n in plain if type(n) is int} | {n for n in range(layers) if (n + 1) % step}
    return Architecture(
        family=family,
        layers=layers,
        dense_layers=frozenset(dense & set(range(layers))),
        hidden_size=hidden,
        vocabulary=size_in(config, "vocab_size", where),
        heads=heads,
        key_value_heads=size_in(config, "num_key_value_heads", where, default=heads),
        head_size=size_in(config, "head_dim", where, default=hidden // heads),
        head_norm=traits.head_norm,
        attention_bias=bool(config.get("attention_bias", False)),
        experts=experts,
        expert_size=inner,
        dense_size=size_in(config, "intermediate_size", where) if dense else 0,
        experts_per_token=per_token,
        normalizes_top_k=bool(config.get("norm_topk_prob", traits.normalizes_top_k)),
        epsilon=_number(config, "rms_norm_eps", where),
        rope_theta=_number(rope if rope.get("rope_theta") else config, "rope_theta", where),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _number(config: Mapping[str, Any], name: str, where: str) -> float:
    value = config.get(name)
    if value is None:
        raise CheckpointError(f"{where}: has no {name}; download it again")
    if type(value) not in {int, float} or not 0 < value < 1e30:
        raise CheckpointError(f"{where}: {name} is {value!r}, not a number; download it again")
    return float(value)


def longest_context(config: Mapping[str, Any], where: str) -> int:
    """Number of tokens up to which every token sees all tokens before it.

    Raises:
        CheckpointError: The config does not say.
    """
    limits = [config.get("max_position_embeddings")]
    if config.get("use_sliding_window", True):
        limits.append(config.get("sliding_window"))
    known = [limit for limit in limits if type(limit) is int and limit > 0]
    if not known:
        raise CheckpointError(f"{where}: has no max_position_embeddings; download it again")
    return min(known)


def _refuse(where: str, setting: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise CheckpointError(
            f"{where}: {setting} is {value!r}, which the reference on a CPU does not compute; "
            f"it has {', '.join(map(repr, allowed))} alone"
        )


def embed(tokens: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The residual stream before the first layer, ``[batch, length, hidden]``.

    Args:
        tokens: ``[batch, length]``, ``torch.int64``.
        weights: The model's weights.
    """
    return functional.embedding(tokens, weights(EMBEDDINGS))


def attention(
    hidden: torch.Tensor, weights: Weights, layer: int, model: Architecture
) -> torch.Tensor:
    """The residual stream after a layer's attention, ``[batch, length, hidden]``."""
    batch, length, _ = hidden.shape
    path = f"layers.{layer}.self_attn"

    def project(values: torch.Tensor, name: str) -> torch.Tensor:
        bias = weights(f"{path}.{name}.bias") if model.attention_bias else None
        return functional.linear(values, weights(f"{path}.{name}.weight"), bias)

    def heads(values: torch.Tensor, norm: str | None = None) -> torch.Tensor:
        split = values.view(batch, length, -1, model.head_size)
        if norm is not None and model.head_norm:
            split = _rms_norm(split, weights(f"{path}.{norm}.weight"), model.epsilon)
        return split.transpose(1, 2)

    normed = _rms_norm(hidden, weights(f"layers.{layer}.input_layernorm.weight"), model.epsilon)
    cosine, sine = _rotations(length, model)
    queries = _rotate(heads(project(normed, "q_proj"), "q_norm"), cosine, sine)
    keys = _rotate(heads(project(normed, "k_proj"), "k_norm"), cosine, sine)
    values = heads(project(normed, "v_proj"))
    groups = model.heads // model.key_value_heads
    mixed = functional.scaled_dot_product_attention(
        queries,
        keys.repeat_interleave(groups, dim=1),
        values.repeat_interleave(groups, dim=1),
        is_causal=True,
    )
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)
    return hidden + project(mixed, "o_proj")


def feed_forward_input(
    hidden: torch.Tensor, weights: Weights, layer: int, model: Architecture
) -> torch.Tensor:
    """What a layer's experts, or its plain MLP, are given: ``[batch, length, hidden]``."""
    name = f"layers.{layer}.post_attention_layernorm.weight"
    return _rms_norm(hidden, weights(name), model.epsilon)


def feed_forward(
    inputs: torch.Tensor, weights: Weights, layer: int, model: Architecture
) -> torch.Tensor:
    """Output of a layer's experts, or of its plain MLP, before it is added to the stream.

    Args:
        inputs: ``[..., hidden]``.
        weights: The model's weights; those of an expert that no token goes to are not asked for.
        layer: The layer's number.
        model: How the model computes.
    """
    family = model.family
    if layer in model.dense_layers:
        dense = [weights(f"layers.{layer}.mlp.{name}.weight") for name in family.projections]
        return _gated(inputs, *dense)
    tokens = inputs.reshape(-1, inputs.shape[-1])
    affinities = functional.linear(tokens, weights(family.router_key(layer))).softmax(dim=-1)
    shares, chosen = affinities.topk(model.experts_per_token, dim=-1)
    if model.normalizes_top_k:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    # One expert's tokens after the other's: each weight is asked for once, if at all.
    order = chosen.flatten().argsort(stable=True)
    token = order // model.experts_per_token
    counts = chosen.flatten().bincount(minlength=model.experts).tolist()
    outputs = []
    for expert, part in enumerate(torch.split(tokens[token], counts)):
        if part.numel():
            own = [weights(family.expert_key(layer, expert, name)) for name in family.projections]
            outputs.append(_gated(part, *own))
    weighted = torch.cat(outputs) * shares.flatten()[order, None]
    return torch.zeros_like(tokens).index_add(0, token, weighted).view_as(inputs)


def logits(hidden: torch.Tensor, weights: Weights, model: Architecture) -> torch.Tensor:
    """Logits of each next token, ``[..., vocabulary]``.

    Args:
        hidden: The residual stream after the last layer, ``[..., hidden]``.
        weights: The model's weights.
        model: How the model computes.
    """
    normed = _rms_norm(hidden, weights(FINAL_NORM), model.epsilon)
    return functional.linear(normed, weights(EMBEDDINGS if model.tied else LM_HEAD))


def forward(tokens: torch.Tensor, weights: Weights, model: Architecture) -> torch.Tensor:
    """Logits of each next token of whole sequences, ``[batch, length, vocabulary]``.

    Args:
        tokens: ``[batch, length]``, ``torch.int64``.
        weights: The model's weights.
        model: How the model computes.
    """
    hidden = embed(tokens, weights)
    for layer in range(model.layers):
        hidden = attention(hidden, weights, layer, model)
        inputs = feed_forward_input(hidden, weights, layer, model)
        hidden = hidden + feed_forward(inputs, weights, layer, model)
    return logits(hidden, weights, model)


def _gated(
    values: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    inner = functional.silu(functional.linear(values, gate)) * functional.linear(values, up)
    return functional.linear(inner, down)


def _rms_norm(values: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    variance = values.pow(2).mean(dim=-1, keepdim=True)
    return weight * (values * torch.rsqrt(variance + epsilon))


def _rotations(length: int, model: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding, each ``[length, head_size]``."""
    exponents = torch.arange(0, model.head_size, 2, dtype=torch.float32) / model.head_size
    angles = torch.outer(torch.arange(length, dtype=torch.float32), model.rope_theta**-exponents)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine
