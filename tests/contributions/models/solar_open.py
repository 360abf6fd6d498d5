"""Solar-Open: every layer has experts, shared ones too, and a correction bias."""

from __future__ import annotations

from tests.contributions import tiny
from tests.contributions.contribution import Contribution
from tests.contributions.models.glm4_moe import write_moe


def _write(model: tiny.Tiny) -> None:
    for path in model.layers():
        write_moe(model, f"{path}.mlp")


SOLAR_OPEN = Contribution(
    name="Solar-Open-100B",
    ref="refs/pull/65/head",
    path="contrib/models/solar_open",
    application="solar_open.modeling_solar_open:NeuronSolarOpenForCausalLM",
    config={
        **tiny.COMMON,
        "architectures": ["SolarOpenForCausalLM"],
        "model_type": "solar_open",
        "n_routed_experts": tiny.EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": tiny.CHOSEN,
        "moe_intermediate_size": tiny.INNER,
        "intermediate_size": tiny.DENSE,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    write=_write,
)
