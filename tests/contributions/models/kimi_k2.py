"""Kimi-K2: DeepSeek-V3's layers, and a loader of its own."""

from __future__ import annotations

from tests.contributions import tiny
from tests.contributions.contribution import Contribution
from tests.contributions.models import deepseek_v3
from tests.contributions.models.glm4_moe import DENSE_LAYERS, write_layers


def _write(model: tiny.Tiny) -> None:
    write_layers(model, tiny.LAYERS + DENSE_LAYERS, deepseek_v3.write_latent_attention)


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
