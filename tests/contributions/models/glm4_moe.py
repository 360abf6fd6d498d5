"""GLM-4.5 and 4.6: a dense first layer, biased attention, shared experts, a layer of MTP."""

from __future__ import annotations

from collections.abc import Callable

from tests.contributions import tiny
from tests.contributions.contribution import Contribution

DENSE_LAYERS = 1


def write_moe(model: tiny.Tiny, path: str) -> None:
    """A MoE block with a correction bias of the router, and a shared expert."""
    model.linear(f"{path}.gate", tiny.EXPERTS, tiny.HIDDEN)
    model.normal(f"{path}.gate.e_score_correction_bias", tiny.EXPERTS)
    model.experts(f"{path}.experts")
    # Smaller than the largest of the others, which their error would not show beside otherwise.
    model.feed_forward(f"{path}.shared_experts", tiny.INNER, factor=0.25)


def write_mtp(model: tiny.Tiny, path: str) -> None:
    """What a layer that predicts further tokens has beside a usual one."""
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        model.norm(f"{path}.{norm}", tiny.HIDDEN)
    model.linear(f"{path}.eh_proj", tiny.HIDDEN, 2 * tiny.HIDDEN)
    model.normal(f"{path}.embed_tokens.weight", tiny.VOCABULARY, tiny.HIDDEN)
    model.linear(f"{path}.shared_head.head", tiny.VOCABULARY, tiny.HIDDEN)


def write_layers(
    model: tiny.Tiny, number: int, write_attention: Callable[[tiny.Tiny, str], None]
) -> None:
    """So many layers, the first ones dense, the others with experts."""
    model.ends()
    for layer in range(number):
        path = f"model.layers.{layer}"
        model.layer_norms(path)
        write_attention(model, f"{path}.self_attn")
        if layer < DENSE_LAYERS:
            model.feed_forward(f"{path}.mlp", tiny.DENSE)
        else:
            write_moe(model, f"{path}.mlp")


def _write_attention(model: tiny.Tiny, path: str) -> None:
    model.attention(path, bias=True, norms=tiny.HEAD)


def _write(model: tiny.Tiny) -> None:
    layers = tiny.LAYERS + DENSE_LAYERS
    write_layers(model, layers + 1, _write_attention)
    write_mtp(model, f"model.layers.{layers}")


GLM_4_5 = Contribution(
    name="GLM-4.5",
    ref="refs/pull/58/head",
    path="contrib/models/glm4_moe",
    application="glm4_moe.modeling_glm4_moe:NeuronGlm4MoeForCausalLM",
    config={
        **tiny.COMMON,
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "num_hidden_layers": tiny.LAYERS + DENSE_LAYERS,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": DENSE_LAYERS,
        "n_routed_experts": tiny.EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": tiny.CHOSEN,
        "moe_intermediate_size": tiny.INNER,
        "intermediate_size": tiny.DENSE,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
    },
    write=_write,
)
