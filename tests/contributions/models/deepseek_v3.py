"""DeepSeek-V3: multi-head latent attention, groups of experts, block FP8, a layer of MTP."""

from __future__ import annotations

from tests.contributions import tiny
from tests.contributions.contribution import Contribution
from tests.contributions.models.glm4_moe import DENSE_LAYERS, write_layers, write_mtp

LATENT_Q, LATENT_KV = 48, 32
NOPE, ROPE, VALUE = 16, 16, 16


def write_latent_attention(model: tiny.Tiny, path: str) -> None:
    """Queries, and keys and values, through a narrow vector each."""
    model.linear(f"{path}.q_a_proj", LATENT_Q, tiny.HIDDEN)
    model.norm(f"{path}.q_a_layernorm", LATENT_Q)
    model.linear(f"{path}.q_b_proj", tiny.HEADS * (NOPE + ROPE), LATENT_Q)
    model.linear(f"{path}.kv_a_proj_with_mqa", LATENT_KV + ROPE, tiny.HIDDEN)
    model.norm(f"{path}.kv_a_layernorm", LATENT_KV)
    model.linear(f"{path}.kv_b_proj", tiny.HEADS * (NOPE + VALUE), LATENT_KV)
    model.linear(f"{path}.o_proj", tiny.HIDDEN, tiny.HEADS * VALUE)


LATENT_CONFIG = {
    "q_lora_rank": LATENT_Q,
    "kv_lora_rank": LATENT_KV,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "qk_head_dim": NOPE + ROPE,
    "v_head_dim": VALUE,
    "num_key_value_heads": tiny.HEADS,
    "attention_bias": False,
    "attention_dropout": 0.0,
}


def write(model: tiny.Tiny) -> None:
    """A dense layer, two with experts, and one that predicts a further token."""
    layers = tiny.LAYERS + DENSE_LAYERS
    write_layers(model, layers + 1, write_latent_attention)
    write_mtp(model, f"model.layers.{layers}")


MOE_CONFIG = {
    "num_hidden_layers": tiny.LAYERS + DENSE_LAYERS,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": DENSE_LAYERS,
    "moe_layer_freq": 1,
    "n_routed_experts": tiny.EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": tiny.CHOSEN,
    "moe_intermediate_size": tiny.INNER,
    "intermediate_size": tiny.DENSE,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}

DEEPSEEK_V3 = Contribution(
    name="DeepSeek-V3",
    ref="4bcdc54",
    path="contrib/models/DeepSeek-V3",
    application="src.modeling_deepseek:NeuronDeepseekV3ForCausalLM",
    root=".",
    config={
        **tiny.COMMON,
        **LATENT_CONFIG,
        **MOE_CONFIG,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
    },
    write=write,
    blocks=True,
)
