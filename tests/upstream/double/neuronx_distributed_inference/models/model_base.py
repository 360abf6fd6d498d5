"""What decoders have in common: attention, the cache, the graphs, fused speculation."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from neuronx_distributed.parallel_layers.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    SPMDRank,
)
from neuronx_distributed.parallel_layers.parallel_state import get_tensor_model_parallel_size
from torch import nn

from neuronx_distributed_inference.models.application_base import NeuronApplicationBase
from neuronx_distributed_inference.models.config import InferenceConfig
from neuronx_distributed_inference.models.model_wrapper import (
    CONTEXT_ENCODING_MODEL_TAG,
    TOKEN_GENERATION_MODEL_TAG,
    ModelWrapper,
)


def _rotated(heads: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary position embedding of ``[B, heads, S, D]``."""
    size = heads.shape[-1]
    frequencies = base ** (-torch.arange(0, size, 2) / size)
    angles = (positions[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
    first, second = heads.chunk(2, dim=-1)
    return heads * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def head_dim_of(config: InferenceConfig) -> int:
    """Width of a head; a model's attention may have its own idea of it."""
    size: int = getattr(config, "attention_head_dim", None) or config.head_dim
    return size


class GroupQueryAttentionQKV(nn.Module):
    """The projections to queries, keys and values: three weights, or one."""

    def __init__(self, config: InferenceConfig) -> None:
        super().__init__()
        hidden, head = config.hidden_size, head_dim_of(config)
        self.sizes = [
            count * head
            for count in (
                config.num_attention_heads,
                config.num_key_value_heads,
                config.num_key_value_heads,
            )
        ]
        dtype = config.neuron_config.torch_dtype
        self.fused = config.neuron_config.fused_qkv

        def linear(size: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(hidden, size, bias=False, gather_output=False, dtype=dtype)

        if self.fused:
            self.Wqkv = linear(sum(self.sizes))
        else:
            self.q_proj, self.k_proj, self.v_proj = map(linear, self.sizes)

    def preshard_hook(self, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
        """Rename what a checkpoint has one level higher, and say how a fused weight is cut."""
        path = prefix.removesuffix(".weight")
        for name, _ in self.named_children():
            for suffix in ("weight", "scale"):
                key = f"{path.rpartition('.')[0]}.{name}.{suffix}"
                if key in state_dict:
                    state_dict[f"{path}.{name}.{suffix}"] = state_dict.pop(key)
        if self.fused:
            for parameter in self.Wqkv.parameters(recurse=False):
                parameter.fused_sizes = self.sizes

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.fused:
            ranks = get_tensor_model_parallel_size()
            return self.Wqkv(hidden_states).split([size // ranks for size in self.sizes], dim=-1)
        return tuple(layer(hidden_states) for layer in (self.q_proj, self.k_proj, self.v_proj))


class GroupQueryAttentionO(nn.Module):
    def __init__(self, config: InferenceConfig) -> None:
        super().__init__()
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * head_dim_of(config),
            config.hidden_size,
            bias=False,
            dtype=config.neuron_config.torch_dtype,
        )

    def preshard_hook(self, state_dict: dict[str, torch.Tensor], prefix: str) -> None:
        path = prefix.removesuffix(".weight")
        for suffix in ("weight", "scale"):
            if f"{path}.{suffix}" in state_dict:
                state_dict[f"{path}.o_proj.{suffix}"] = state_dict.pop(f"{path}.{suffix}")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.o_proj(hidden_states)


class NeuronAttentionBase(nn.Module):
    """Causal attention, with norms of queries and keys or without."""

    def __init__(self, config: InferenceConfig, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim, self.base = head_dim_of(config), config.rope_theta
        self.rank_util = SPMDRank(world_size=config.neuron_config.tp_degree)
        self.qkv_proj = GroupQueryAttentionQKV(config)
        self.o_proj = GroupQueryAttentionO(config)
        self.q_layernorm, self.k_layernorm = (
            nn.RMSNorm(head_dim_of(config), eps=config.rms_norm_eps) if qk_norm else nn.Identity()
            for _ in range(2)
        )

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv_proj(hidden_states)
        )
        query = _rotated(self.q_layernorm(query), positions, self.base)
        key = _rotated(self.k_layernorm(key), positions, self.base)
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class KVCacheManager(nn.Module):
    def __init__(self, config: InferenceConfig) -> None:
        super().__init__()
        settings = config.neuron_config
        heads = config.num_key_value_heads // settings.tp_degree
        shape = (settings.kv_cache_batch_size, heads, settings.max_length, head_dim_of(config))
        self.past_key_values = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=settings.torch_dtype), requires_grad=False)
            for _ in range(2 * config.num_hidden_layers)
        )


class NeuronDecoderLayer(nn.Module):
    def __init__(self, config: InferenceConfig, mlp: nn.Module, qk_norm: bool) -> None:
        super().__init__()
        self.self_attn = NeuronAttentionBase(config, qk_norm)
        self.mlp = mlp
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), positions
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))[0]


class NeuronBaseModel(nn.Module):
    """A decoder; a subclass says what the feed-forward block of its layers is."""

    qk_norm = True

    def __init__(self, config: InferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.neuron_config = config.neuron_config
        self.on_device_sampling = config.neuron_config.on_device_sampling_config is not None
        self.rank_util = SPMDRank(world_size=config.neuron_config.tp_degree)
        dtype = config.neuron_config.torch_dtype
        self.embed_tokens = ParallelEmbedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList(
            NeuronDecoderLayer(config, self.feed_forward(config), self.qk_norm)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = ColumnParallelLinear(
            config.hidden_size, config.vocab_size, bias=False, dtype=dtype
        )
        self.kv_mgr = KVCacheManager(config)

    def feed_forward(self, config: InferenceConfig) -> nn.Module:
        raise NotImplementedError

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        seq_ids: torch.Tensor,
        sampling_params: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The last token's logits ``[B, 1, vocab]``, or the next token ``[B, 1]``; then the cache.

        Context encoding only.
        """
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_ids)
        logits = self.lm_head(self.norm(hidden_states[:, -1:]))
        outputs = logits.argmax(-1) if self.on_device_sampling else logits
        return [outputs, *self.kv_mgr.past_key_values]


class NeuronBaseForCausalLM(NeuronApplicationBase):
    _model_cls: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model_cls = self._model_cls
        tags = [CONTEXT_ENCODING_MODEL_TAG, TOKEN_GENERATION_MODEL_TAG]
        if self.neuron_config.enable_fused_speculation:
            model_cls = NeuronFusedSpecModel
        for tag in tags:
            config = copy.deepcopy(self.config)
            config.neuron_config.is_prefill_stage = tag == CONTEXT_ENCODING_MODEL_TAG
            if tag == TOKEN_GENERATION_MODEL_TAG:
                config.neuron_config.n_active_tokens = 1
            self.models.append(ModelWrapper(config=config, model_cls=model_cls, tag=tag))


class NeuronFusedSpecModel(nn.Module):
    """A draft and its target in one graph."""

    def __init__(self, config: InferenceConfig) -> None:
        super().__init__()
        self.config = config
        self.neuron_config = config.neuron_config
        speculation = config.fused_spec_config
        self.worker_cls = speculation.worker_cls
        self.draft_model_cls = speculation.draft_model_cls
        draft_cls = self.worker_cls
        if self.draft_model_cls is not None:
            draft_cls = self.draft_model_cls._model_cls
        self.draft_model = draft_cls(speculation.draft_config)
        self.target_model = self.worker_cls(config)
