"""The families of NxDI's own models."""

from __future__ import annotations

from nxdi_expertscale.families.built_in.limits import (
    LLAMA4_LIMITS,
    MIXTRAL_LIMITS,
    QWEN3_MOE_LIMITS,
)
from nxdi_expertscale.families.declaration import DecoderTraits, MoEFamily, Stacking
from nxdi_expertscale.families.linears import attention_linears

QWEN3_MOE = MoEFamily(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    converter=(
        "neuronx_distributed_inference.models.qwen3_moe.modeling_qwen3_moe"
        ":convert_qwen3_moe_hf_to_neuron_state_dict"
    ),
    stacked=Stacking.OUTPUTS_FIRST,
    # Qwen3-Coder-30B-A3B, which has a config of its own: pull request 67.
    config_modules=("*.modeling_qwen3_coder_moe",),
    limits=QWEN3_MOE_LIMITS,
    decoder=DecoderTraits(head_norm=True, normalizes_top_k=False),
)

MIXTRAL = MoEFamily(
    name="mixtral",
    model_types=("mixtral",),
    converter=(
        "neuronx_distributed_inference.models.mixtral.modeling_mixtral"
        ":convert_mixtral_to_neuron_state_dict"
    ),
    experts="layers.{layer}.block_sparse_moe.experts",
    router="layers.{layer}.block_sparse_moe.gate",
    gate="w1",
    up="w3",
    down="w2",
    # contrib/models/Mixtral-8x7B-Instruct-v0.1, which has a config of its own.
    config_modules=("*.modeling_mixtral",),
    num_experts=("num_local_experts",),
    intermediate_size=("intermediate_size",),
    limits=MIXTRAL_LIMITS,
    decoder=DecoderTraits(head_norm=False, normalizes_top_k=True),
)

_LLAMA4 = "neuronx_distributed_inference.models.llama4.modeling_llama4_text"

LLAMA4 = MoEFamily(
    name="llama4",
    model_types=("llama4", "llama4_text"),
    converter=f"{_LLAMA4}:NeuronLlama4TextForCausalLM.convert_hf_to_neuron_state_dict",
    experts="language_model.model.layers.{layer}.feed_forward.experts",
    router="language_model.model.layers.{layer}.feed_forward.router",
    expert_mlps="layers.{layer}.feed_forward.moe.expert_mlps",
    renamed_linears=attention_linears(
        "language_model.model.layers.{layer}.self_attn", "layers.{layer}.self_attn"
    ),
    embeddings="language_model.model.embed_tokens",
    final_norm="language_model.model.norm",
    head="language_model.lm_head",
    prefixes=("",),
    stacked=Stacking.INPUTS_FIRST,
    converter_reads_stacked=True,
    converter_knows_scales=True,
    full_precision=("lm_head", "shared_expert", "vision_model", "multi_modal_projector"),
    num_experts=("num_local_experts",),
    intermediate_size=("intermediate_size",),
    limits=LLAMA4_LIMITS,
)

OF_NXDI: tuple[MoEFamily, ...] = (QWEN3_MOE, MIXTRAL, LLAMA4)
