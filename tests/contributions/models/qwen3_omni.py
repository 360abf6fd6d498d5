"""Qwen3-Omni's thinker: Qwen3 MoE within a config and names of its own, beside other parts."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tests.contributions import tiny
from tests.contributions.contribution import Contribution

_MODULE = "src.modeling_qwen3_omni_moe"


def _write(model: tiny.Tiny) -> None:
    for path in model.layers(norms=tiny.HEAD):
        model.routed(f"{path}.mlp")
    model.tensors = {f"thinker.{name}": value for name, value in model.tensors.items()}
    model.linear("thinker.visual.merger.mlp.0", tiny.HIDDEN, tiny.HIDDEN, bias=True)
    model.linear("thinker.audio_tower.proj1", tiny.HIDDEN, tiny.HIDDEN, bias=True)
    model.linear("talker.model.layers.0.mlp.experts.0.up_proj", tiny.INNER, tiny.HIDDEN)


def _make_config(neuron_config: Any, folder: Path) -> Any:
    module = importlib.import_module(_MODULE)
    load_config = module.load_qwen3_omni_thinker_text_config(str(folder))
    return module.Qwen3OmniMoeInferenceConfig(neuron_config, load_config=load_config)


_TEXT = {
    **tiny.COMMON,
    "model_type": "qwen3_omni_moe_text",
    "num_experts": tiny.EXPERTS,
    "num_experts_per_tok": tiny.CHOSEN,
    "moe_intermediate_size": tiny.INNER,
    "intermediate_size": tiny.DENSE,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_scaling": {"mrope_section": [4, 2, 2], "rope_type": "default", "interleaved": True},
}

QWEN3_OMNI = Contribution(
    name="Qwen3-Omni-30B-A3B (thinker)",
    ref="refs/pull/167/head",
    path="contrib/models/Qwen3-Omni-30B-A3B-Instruct",
    application=f"{_MODULE}:NeuronQwen3OmniMoeForCausalLM",
    root=".",
    make_config=_make_config,
    config={
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"model_type": "qwen3_omni_moe_thinker", "text_config": _TEXT},
        "talker_config": {"model_type": "qwen3_omni_moe_talker"},
    },
    write=_write,
)
