"""MiniCPM-MoE-8x2B: w1, w3 and w2, embeddings scaled and tied, layers scaled by the depth."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from tests.contributions import tiny
from tests.contributions.contribution import Contribution

_MODULE = "modeling_minicpm_moe_neuronx"


def _write(model: tiny.Tiny) -> None:
    for path in model.layers():
        model.routed(f"{path}.mlp", names=("w1", "w3", "w2"))


def _make_config(neuron_config: Any, folder: Path) -> Any:
    """As its ``from_pretrained`` does, but for the model's own code, which that reads."""
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config_cls = importlib.import_module(_MODULE).MiniCPMMoEInferenceConfig
    names = (*config_cls.get_required_attributes(None), "hidden_act", "pad_token_id")
    kept = {name: fields[name] for name in (*names, "tie_word_embeddings")}
    return config_cls(neuron_config=neuron_config, **kept)


MINICPM_MOE = Contribution(
    name="MiniCPM-MoE-8x2B",
    ref="refs/pull/89/head",
    path="contrib/models/minicpm-moe-8x2b",
    application=f"{_MODULE}:NeuronMiniCPMMoEForCausalLM",
    make_config=_make_config,
    config={
        **tiny.COMMON,
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "num_experts": tiny.EXPERTS,
        "num_experts_per_tok": tiny.CHOSEN,
        "intermediate_size": tiny.INNER,
        "scale_emb": 2,
        "scale_depth": 1.4,
        "dim_model_base": 32,
    },
    write=_write,
)
