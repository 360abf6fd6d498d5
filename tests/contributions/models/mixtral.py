"""Mixtral as it was contributed, with NxDI's converter imported by name."""

from __future__ import annotations

from tests.contributions import tiny
from tests.contributions.contribution import Contribution


def _write(model: tiny.Tiny) -> None:
    for path in model.layers():
        model.routed(f"{path}.block_sparse_moe", names=("w1", "w3", "w2"))


MIXTRAL = Contribution(
    name="Mixtral-8x7B",
    ref="4bcdc54",
    path="contrib/models/Mixtral-8x7B-Instruct-v0.1",
    application="modeling_mixtral:NeuronMixtralForCausalLM",
    config={
        **tiny.COMMON,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": tiny.EXPERTS,
        "num_experts_per_tok": tiny.CHOSEN,
        "intermediate_size": tiny.INNER,
        "sliding_window": None,
    },
    write=_write,
)
