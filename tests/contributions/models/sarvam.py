"""sarvam-30b: queries, keys and values fused in the files, a bias of the router, shared experts."""

from __future__ import annotations

from tests.contributions import tiny
from tests.contributions.contribution import Contribution

_DENSE_LAYERS = 1


def _write(model: tiny.Tiny) -> None:
    model.ends(embeddings="word_embeddings")
    for layer in range(tiny.LAYERS + _DENSE_LAYERS):
        path = f"model.layers.{layer}"
        model.layer_norms(path)
        heads = tiny.HEADS + 2 * tiny.GROUPS
        model.linear(f"{path}.attention.query_key_value", heads * tiny.HEAD, tiny.HIDDEN)
        model.linear(f"{path}.attention.dense", tiny.HIDDEN, tiny.HEADS * tiny.HEAD)
        model.norm(f"{path}.attention.query_layernorm", tiny.HEAD)
        model.norm(f"{path}.attention.key_layernorm", tiny.HEAD)
        if layer < _DENSE_LAYERS:
            model.feed_forward(f"{path}.mlp", tiny.DENSE)
            continue
        model.linear(f"{path}.mlp.gate", tiny.EXPERTS, tiny.HIDDEN)
        model.normal(f"{path}.mlp.gate.expert_bias", tiny.EXPERTS)
        model.experts(f"{path}.mlp.experts")
        model.feed_forward(f"{path}.mlp.shared_experts", tiny.INNER)


SARVAM = Contribution(
    name="sarvam-30b",
    ref="refs/pull/83/head",
    path="contrib/models/sarvam-30b",
    application="modeling_sarvam:NeuronSarvamForCausalLM",
    config_cls="modeling_sarvam:SarvamInferenceConfig",
    config={
        **tiny.COMMON,
        "architectures": ["SarvamMoEForCausalLM"],
        "model_type": "sarvam_moe",
        "num_hidden_layers": tiny.LAYERS + _DENSE_LAYERS,
        "first_k_dense_replace": _DENSE_LAYERS,
        "num_experts": tiny.EXPERTS,
        "num_shared_experts": 1,
        "num_experts_per_tok": tiny.CHOSEN,
        "moe_intermediate_size": tiny.INNER,
        "moe_shared_expert_intermediate_size": tiny.INNER,
        "intermediate_size": tiny.DENSE,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    },
    write=_write,
)
