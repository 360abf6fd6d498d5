"""OLMoE: norms of queries and keys as wide as all heads, routing weights as they are."""

from __future__ import annotations

from tests.contributions import tiny
from tests.contributions.contribution import Contribution

_WIDTH = tiny.HEADS * tiny.HEAD


def _write(model: tiny.Tiny) -> None:
    model.ends()
    for layer in range(tiny.LAYERS):
        path = f"model.layers.{layer}"
        model.layer_norms(path)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            model.linear(f"{path}.self_attn.{name}", tiny.HIDDEN, _WIDTH)
        model.norm(f"{path}.self_attn.q_norm", _WIDTH)
        model.norm(f"{path}.self_attn.k_norm", _WIDTH)
        model.linear(f"{path}.mlp.gate", tiny.EXPERTS, tiny.HIDDEN)
        model.experts(f"{path}.mlp.experts")


OLMOE = Contribution(
    name="OLMoE-1B-7B",
    ref="refs/pull/78/head",
    path="contrib/models/OLMoE-1B-7B-0924",
    application="modeling_olmoe:NeuronOlmoeForCausalLM",
    config_cls="modeling_olmoe:OlmoeInferenceConfig",
    config={
        **tiny.COMMON,
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "num_key_value_heads": tiny.HEADS,
        "num_experts": tiny.EXPERTS,
        "num_experts_per_tok": tiny.CHOSEN,
        "intermediate_size": tiny.INNER,
        "norm_topk_prob": False,
    },
    write=_write,
)
