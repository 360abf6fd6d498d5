"""Kimi-K2: DeepSeek-V3's layers, and a loader of its own."""

from __future__ import annotations

from tests.contributions import tiny
from tests.contributions.contribution import Contribution
from tests.contributions.models import deepseek_v3
from tests.contributions.models.glm4_moe import DENSE_LAYERS, write_moe


def _write(model: tiny.Tiny) -> None:
    model.ends()
    for layer in range(tiny.LAYERS + DENSE_LAYERS):
        path = f"model.layers.{layer}"
        model.layer_norms(path)
        deepseek_v3.write_latent_attention(model, f"{path}.self_attn")
        if layer < DENSE_LAYERS:
            model.feed_forward(f"{path}.mlp", tiny.DENSE)
        else:
            write_moe(model, f"{path}.mlp")


KIMI_K2 = Contribution(
    name="Kimi-K2",
    ref="refs/pull/131/head",
    path="contrib/models/Kimi-K2-Instruct-0905",
    application="modeling_kimi_k2:NeuronKimiK2ForCausalLM",
    config={
        **tiny.COMMON,
        **deepseek_v3.LATENT_CONFIG,
        **deepseek_v3.MOE_CONFIG,
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "num_nextn_predict_layers": 0,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    write=_write,
    blocks=True,
)
