"""What a model's ``config.json`` says, read and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nxdi_expertscale.errors import damaged
from nxdi_expertscale.families.declaration import MoEFamily

MAX_LAYERS = 1 << 16
"""More layers, and more experts in each, than any model has."""

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class ModelConfig:
    """A model's config, in Hugging Face's own names.

    Of a model that also sees or hears these are the fields of its language model
    (``text_config``, or as the family says). What a config may leave out is None.

    Attributes:
        where: Its file, for messages.
        raw: The whole of the parsed file, as it is copied into a new checkpoint.
        model_type: The model's type.
        num_hidden_layers: Number of layers.
        hidden_size: Width of the residual stream.
        vocab_size: Number of tokens that are embedded.
        num_experts: Number of experts in a layer.
        num_experts_per_tok: Number of experts that a token is routed to.
        moe_intermediate_size: Width of an expert between its projections.
        intermediate_size: Width of a dense layer's MLP between its projections.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key and value heads.
        head_dim: Width of an attention head.
        attention_bias: Whether the projections of the attention have a bias.
        clip_qkv: Magnitude beyond which queries, keys and values are clipped, if they are.
        hidden_act: Activation function of the MLPs.
        norm_topk_prob: Whether the routing weights of a token are made to add up to one.
        mlp_only_layers: Layers that have a dense MLP in place of experts.
        decoder_sparse_step: Every so many layers one has experts.
        layer_types: Kind of each layer's attention, in order, where they differ.
        rms_norm_eps: Epsilon of the RMS norms.
        rope_type: Kind of the rotary embedding, ``default`` where it is not scaled.
        rope_theta: Base of the rotary embedding.
        max_position_embeddings: Longest sequence, in tokens.
        sliding_window: Tokens that a token attends to; None where it attends to all before it.
        tie_word_embeddings: Whether the embeddings are the output layer's weight too.
        dtype: Name of the dtype that the weights are published in, as in torch.
        quantization_config: How the weights are quantized.
    """

    where: str
    raw: Mapping[str, Any] = field(repr=False)
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int | None
    moe_intermediate_size: int
    intermediate_size: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None
    head_dim: int | None
    attention_bias: bool
    clip_qkv: float | None
    hidden_act: str
    norm_topk_prob: bool | None
    mlp_only_layers: tuple[int, ...]
    decoder_sparse_step: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float | None
    rope_type: str
    rope_theta: float | None
    max_position_embeddings: int | None
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str | None
    quantization_config: Mapping[str, Any] | None

    def layer_type(self, layer: int) -> str | None:
        """Kind of a layer's attention; None where the config does not say."""
        return self.layer_types[layer] if layer < len(self.layer_types) else None


def read_config(raw: Mapping[str, Any], family: MoEFamily, where: str) -> ModelConfig:
    """Read and check a model's config.

    Args:
        raw: What ``config.json`` holds, in the fields of transformers 4 or 5.
        family: The model's family, which names the fields of its experts.
        where: The file, for messages.

    Raises:
        CheckpointError: A size that every model has is missing, or a field has another type than
            it should.
    """
    fields = _Fields(family.language_model_of(raw), where)
    num_experts = family.experts_of(fields.values)
    moe_intermediate_size = family.intermediate_size_of(fields.values)
    if (
        num_experts is None
        or moe_intermediate_size is None
        or not 0 < num_experts <= MAX_LAYERS
        or moe_intermediate_size < 1
    ):
        raise damaged(where, "does not say how many experts a layer has and how wide they are")
    num_experts_per_tok = family.experts_per_token_of(fields.values)
    if num_experts_per_tok is not None and not 0 < num_experts_per_tok <= num_experts:
        raise damaged(
            where, f"says that a token goes to {num_experts_per_tok} of {num_experts} experts"
        )
    num_hidden_layers = fields.size("num_hidden_layers")
    if num_hidden_layers > MAX_LAYERS:
        raise damaged(where, f"num_hidden_layers is {num_hidden_layers}, more than any model has")
    # transformers 5 writes rope_parameters, releases before it rope_theta and rope_scaling.
    rope = _Fields(
        fields.optional("rope_parameters", dict) or fields.optional("rope_scaling", dict) or {},
        where,
    )
    uses_sliding_window = fields.optional("use_sliding_window", bool) is not False
    whole = _Fields(raw, where)
    return ModelConfig(
        where=where,
        raw=raw,
        model_type=str(raw.get("model_type")),
        num_hidden_layers=num_hidden_layers,
        hidden_size=fields.size("hidden_size"),
        vocab_size=fields.size("vocab_size"),
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        moe_intermediate_size=moe_intermediate_size,
        intermediate_size=fields.optional_size("intermediate_size"),
        num_attention_heads=fields.optional_size("num_attention_heads"),
        num_key_value_heads=fields.optional_size("num_key_value_heads"),
        head_dim=fields.optional_size("head_dim"),
        attention_bias=fields.optional("attention_bias", bool) or False,
        clip_qkv=fields.optional_number("clip_qkv"),
        hidden_act=fields.optional("hidden_act", str) or "silu",
        norm_topk_prob=fields.optional("norm_topk_prob", bool),
        mlp_only_layers=fields.layers("mlp_only_layers"),
        decoder_sparse_step=fields.optional_size("decoder_sparse_step") or 1,
        layer_types=fields.kinds(family.layer_types),
        rms_norm_eps=fields.optional_number("rms_norm_eps"),
        rope_type=rope.optional("rope_type", str) or rope.optional("type", str) or "default",
        rope_theta=rope.optional_number("rope_theta") or fields.optional_number("rope_theta"),
        max_position_embeddings=fields.optional_size("max_position_embeddings"),
        sliding_window=fields.optional_size("sliding_window") if uses_sliding_window else None,
        tie_word_embeddings=any(
            part.values.get("tie_word_embeddings") is True for part in (whole, fields)
        ),
        dtype=whole.optional("dtype", str) or whole.optional("torch_dtype", str),
        quantization_config=whole.optional("quantization_config", dict),
    )


class _Fields:
    """The fields of a parsed config, each given with the type that it has to have."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self._where = where

    def optional(self, name: str, kind: type[_Value]) -> _Value | None:
        value = self.values.get(name)
        if value is not None and type(value) is not kind:
            raise damaged(self._where, f"{name} is {value!r}, not {_KINDS[kind]}")
        return value

    def optional_size(self, name: str) -> int | None:
        # Zero is how some configs say that there is none.
        return self.size(name) if self.values.get(name) not in (None, 0) else None

    def size(self, name: str) -> int:
        value = self.values.get(name)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise damaged(self._where, f"{name} is {value!r}, not a size")
        return value

    def optional_number(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) not in {int, float} or not 0 < value < 1e30:
            raise damaged(self._where, f"{name} is {value!r}, not a number")
        return float(value)

    def kinds(self, name: str) -> tuple[str, ...]:
        value = self.optional(name, list) or []
        if not all(type(part) in {str, int} for part in value):
            raise damaged(self._where, f"{name} is {value!r}, not a list of names")
        return tuple(map(str, value))

    def layers(self, name: str) -> tuple[int, ...]:
        value = self.optional(name, list) or []
        if not all(type(layer) is int for layer in value):
            raise damaged(self._where, f"{name} is {value!r}, not a list of layers")
        return tuple(value)


_KINDS: Mapping[type[Any], str] = {
    bool: "true or false",
    dict: "an object",
    list: "a list",
    str: "a string",
}
