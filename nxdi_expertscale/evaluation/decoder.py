"""The decoder that Qwen3 MoE, Mixtral and OLMoE share, in plain torch: pure functions on weights.

It is the reference that quantized weights are measured against. It needs no transformers, so it
runs on any machine and with any release of it, and it takes each weight by its name when it is
needed, so a layer's experts are never in memory together. It agrees with Hugging Face's own
``Qwen3MoeForCausalLM``, ``MixtralForCausalLM`` and ``OlmoeForCausalLM`` to rounding
(``tests/unit/test_decoder.py``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from nxdi_expertscale.evaluation.architecture import (
    EMBEDDINGS,
    FINAL_NORM,
    LM_HEAD,
    Architecture,
)

Weights = Callable[[str], torch.Tensor]
"""Gives a weight as float32 by its name in a checkpoint, without Hugging Face's ``model.``."""


def forward(tokens: torch.Tensor, weights: Weights, model: Architecture) -> torch.Tensor:
    """Logits of each next token of whole sequences.

    Args:
        tokens: ``[batch, length]``, ``torch.int64``.
        weights: The model's weights.
        model: How the model computes.

    Returns:
        ``[batch, length, vocabulary]``, ``torch.float32``.
    """
    hidden = embed(tokens, weights)
    for layer in range(model.num_hidden_layers):
        hidden = attention(hidden, weights, layer, model)
        inputs = normalize_mlp_input(hidden, weights, layer, model)
        hidden = hidden + mlp(inputs, weights, layer, model)
    return logits(hidden, weights, model)


def embed(tokens: torch.Tensor, weights: Weights) -> torch.Tensor:
    """The residual stream before the first layer.

    Args:
        tokens: ``[batch, length]``, ``torch.int64``.
        weights: The model's weights.

    Returns:
        ``[batch, length, hidden]``, ``torch.float32``.
    """
    return functional.embedding(tokens, weights(EMBEDDINGS))


def attention(
    hidden: torch.Tensor, weights: Weights, layer: int, model: Architecture
) -> torch.Tensor:
    """The residual stream after a layer's attention.

    Args:
        hidden: The residual stream before it, ``[batch, length, hidden]``.
        weights: The model's weights.
        layer: The layer's number.
        model: How the model computes.

    Returns:
        ``[batch, length, hidden]``.
    """
    batch, length, _ = hidden.shape
    path = f"layers.{layer}.self_attn"

    def project(values: torch.Tensor, name: str) -> torch.Tensor:
        bias = weights(f"{path}.{name}.bias") if model.attention_bias else None
        return functional.linear(values, weights(f"{path}.{name}.weight"), bias)

    def split_heads(values: torch.Tensor, norm: str | None = None) -> torch.Tensor:
        if norm is not None and model.whole_norm:
            values = _rms_norm(values, weights(f"{path}.{norm}.weight"), model.rms_norm_eps)
        heads = values.view(batch, length, -1, model.head_dim)
        if norm is not None and model.head_norm:
            heads = _rms_norm(heads, weights(f"{path}.{norm}.weight"), model.rms_norm_eps)
        return heads.transpose(1, 2)

    input_norm = weights(f"layers.{layer}.input_layernorm.weight")
    normed = _rms_norm(hidden, input_norm, model.rms_norm_eps)
    cosine, sine = _rotations(length, model)
    queries = _rotate(split_heads(project(normed, "q_proj"), "q_norm"), cosine, sine)
    keys = _rotate(split_heads(project(normed, "k_proj"), "k_norm"), cosine, sine)
    values = split_heads(project(normed, "v_proj"))
    groups = model.num_attention_heads // model.num_key_value_heads
    attended = functional.scaled_dot_product_attention(
        queries,
        keys.repeat_interleave(groups, dim=1),
        values.repeat_interleave(groups, dim=1),
        is_causal=True,
    )
    attended = attended.transpose(1, 2).reshape(batch, length, -1)
    return hidden + project(attended, "o_proj")


def normalize_mlp_input(
    hidden: torch.Tensor, weights: Weights, layer: int, model: Architecture
) -> torch.Tensor:
    """The input of a layer's experts, or of its dense MLP.

    Args:
        hidden: The residual stream after the layer's attention, ``[batch, length, hidden]``.
        weights: The model's weights.
        layer: The layer's number.
        model: How the model computes.

    Returns:
        ``[batch, length, hidden]``.
    """
    norm = weights(f"layers.{layer}.post_attention_layernorm.weight")
    return _rms_norm(hidden, norm, model.rms_norm_eps)


def mlp(inputs: torch.Tensor, weights: Weights, layer: int, model: Architecture) -> torch.Tensor:
    """Output of a layer's experts, or of its dense MLP, before it is added to the stream.

    Args:
        inputs: ``[..., hidden]``.
        weights: The model's weights; those of an expert that no token is routed to are not asked
            for.
        layer: The layer's number.
        model: How the model computes.

    Returns:
        ``[..., hidden]``.
    """
    family = model.family
    if layer in model.dense_layers:
        dense = [weights(f"layers.{layer}.mlp.{name}.weight") for name in family.projections]
        return _gated_mlp(inputs, *dense)
    tokens = inputs.reshape(-1, inputs.shape[-1])
    router_logits = functional.linear(tokens, weights(family.router_key(layer)))
    routing_weights, selected_experts = router_logits.softmax(dim=-1).topk(
        model.num_experts_per_tok, dim=-1
    )
    if model.norm_topk_prob:
        routing_weights = routing_weights / routing_weights.sum(dim=-1, keepdim=True)
    # One expert's tokens after the other's: each weight is asked for once, if at all.
    order = selected_experts.flatten().argsort(stable=True)
    token = order // model.num_experts_per_tok
    counts = selected_experts.flatten().bincount(minlength=model.num_experts).tolist()
    outputs = []
    for expert, routed in enumerate(torch.split(tokens[token], counts)):
        if routed.numel():
            keys = [family.expert_key(layer, expert, name) for name in family.projections]
            outputs.append(_gated_mlp(routed, *map(weights, keys)))
    weighted = torch.cat(outputs) * routing_weights.flatten()[order, None]
    return torch.zeros_like(tokens).index_add(0, token, weighted).view_as(inputs)


def logits(hidden: torch.Tensor, weights: Weights, model: Architecture) -> torch.Tensor:
    """Logits of each next token.

    Args:
        hidden: The residual stream after the last layer, ``[..., hidden]``.
        weights: The model's weights.
        model: How the model computes.

    Returns:
        ``[..., vocabulary]``.
    """
    normed = _rms_norm(hidden, weights(FINAL_NORM), model.rms_norm_eps)
    output = EMBEDDINGS if model.tie_word_embeddings else LM_HEAD
    return functional.linear(normed, weights(output))


def _gated_mlp(
    values: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    inner = functional.silu(functional.linear(values, gate)) * functional.linear(values, up)
    return functional.linear(inner, down)


def _rms_norm(values: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    variance = values.pow(2).mean(dim=-1, keepdim=True)
    return weight * (values * torch.rsqrt(variance + epsilon))


def _rotations(length: int, model: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary embedding, each ``[length, head_dim]``."""
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    angles = torch.outer(torch.arange(length, dtype=torch.float32), model.rope_theta**-exponents)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def _rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to ``[batch, heads, length, head_dim]``."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine
