"""Check that each layer has what Hugging Face's attention needs: its projections and its norms."""

from __future__ import annotations

from collections.abc import Mapping

from nxdi_expertscale.checkpoint.read.architecture import check_shape
from nxdi_expertscale.checkpoint.read.config import ModelConfig
from nxdi_expertscale.checkpoint.read.files import CONFIG, WeightFiles
from nxdi_expertscale.checkpoint.read.layers import tensors_by_layer
from nxdi_expertscale.checkpoint.safetensors_format import StoredTensor
from nxdi_expertscale.errors import CheckpointError, incomplete
from nxdi_expertscale.families.declaration import MoEFamily

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MIN_NORMS = 2
"""One before or after the attention, one before or after the feed-forward part."""


def check_attention(files: WeightFiles, config: ModelConfig, family: MoEFamily) -> None:
    """Check the attention and the norms of each layer against the config.

    Comparing layers with each other (:mod:`.layers`) does not find what all of them lack. Where
    an attention is built in another way, as multi-head latent attention is, it is left alone, and
    so is the number of its heads where layers are of several kinds or values have a width of their
    own (``v_head_dim``).

    Raises:
        CheckpointError: A layer has no attention, or lacks a projection of it or a norm, or has one
            of another shape than the config says.
    """
    layers, _ = tensors_by_layer(files, config, family)
    feed_forward = f"{family.experts.partition('{layer}.')[2].partition('.')[0]}."
    head_size = _head_size(config)
    heads_are_known = len(
        set(config.layer_types)
    ) < 2 and "v_head_dim" not in family.language_model_of(config.raw)
    for layer, tensors in layers.items():
        where = f"{files.folder.path}: layer {layer}"
        if all(rest.count(".") < 2 or rest.startswith(feed_forward) for rest in tensors):
            raise incomplete(where, "has no attention, nor anything in its place")
        _check_norms(files, where, config, tensors)
        for path in _attentions(tensors):
            _check_projections(files, config, path, tensors)
            if heads_are_known and head_size is not None:
                _check_heads(files, config, head_size, path, tensors)


def _head_size(config: ModelConfig) -> int | None:
    if config.head_dim is not None or config.num_attention_heads is None:
        return config.head_dim
    return config.hidden_size // config.num_attention_heads


def _attentions(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Paths in a layer of what has keys and values of its own, or queries beside them."""
    return sorted(
        {
            rest.removesuffix(f".{part}.weight")
            for rest in tensors
            for part in ("k_proj", "v_proj")
            if rest.endswith(f".{part}.weight")
        }
        | {
            path
            for rest in tensors
            if (path := rest.removesuffix(".q_proj.weight")) != rest
            and not any(other.startswith(f"{path}.kv_") for other in tensors)
        }
    )


def _check_norms(
    files: WeightFiles, where: str, config: ModelConfig, tensors: Mapping[str, StoredTensor]
) -> None:
    norms = [rest for rest in tensors if rest.count(".") == 1 and rest.endswith("norm.weight")]
    for rest in norms:
        check_shape(files, tensors[rest], (config.hidden_size,))
    has_attention = any(rest.startswith("self_attn.") for rest in tensors)
    if has_attention and len(norms) < _MIN_NORMS:
        found = f"only {norms[0].removesuffix('.weight')}" if norms else "none"
        raise incomplete(
            where, f"lacks a norm: one of attention and MLP has none, there is {found}"
        )


def _check_projections(
    files: WeightFiles, config: ModelConfig, path: str, tensors: Mapping[str, StoredTensor]
) -> None:
    """Check that all four are there, and lead from the residual stream and back to it."""
    present = [part for part in _PROJECTIONS if f"{path}.{part}.weight" in tensors]
    like = tensors[f"{path}.{present[0]}.weight"]
    for part in _PROJECTIONS:
        tensor = tensors.get(f"{path}.{part}.weight")
        if tensor is None:
            name = like.name.removesuffix(f"{present[0]}.weight") + f"{part}.weight"
            raise incomplete(
                f"{files.folder.path}: {name}", f"is missing, and {like.name} is there"
            )
        side = 0 if part == "o_proj" else -1
        if len(tensor.shape) != 2 or tensor.shape[side] != config.hidden_size:
            raise CheckpointError(
                f"{files.location(tensor)}: has shape {list(tensor.shape)}, and {CONFIG} says "
                f"hidden_size {config.hidden_size}; one of them is another model's"
            )


def _check_heads(
    files: WeightFiles,
    config: ModelConfig,
    head_size: int,
    path: str,
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Check the number of heads, and the norms of queries and keys."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads is None or groups is None:
        return
    hidden = config.hidden_size
    queries = tensors[f"{path}.q_proj.weight"]
    # Twice as many where queries come with a gate for the attention's output.
    if queries.shape[0] != 2 * heads * head_size:
        check_shape(files, queries, (heads * head_size, hidden))
    for part in ("k_proj", "v_proj"):
        check_shape(files, tensors[f"{path}.{part}.weight"], (groups * head_size, hidden))
    check_shape(files, tensors[f"{path}.o_proj.weight"], (hidden, heads * head_size))
    for part, number in (("q_norm", heads), ("k_norm", groups)):
        norm = tensors.get(f"{path}.{part}.weight")
        # Over each head, or over all of them.
        if norm is not None and norm.shape != (number * head_size,):
            check_shape(files, norm, (head_size,))
