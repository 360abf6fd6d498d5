"""The families of models that were contributed to NxDI, and are not in its packages.

A user copies such a model's file into a package of his own, from ``contrib/models`` of NxDI's
repository or from a pull request; each says below where it was read.
"""

from __future__ import annotations

from nxdi_expertscale.families.declaration import DecoderTraits, MoEFamily
from nxdi_expertscale.families.linears import RenamedLinear, attention_linears

_ROUTED = ("n_routed_experts",)
_MOE_SIZE = ("moe_intermediate_size",)
_MLA = ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""Of multi-head latent attention: two are ``nn.Linear``, and the weight of ``kv_b_proj`` is taken
apart and multiplied with as it is."""

GLM4_MOE = MoEFamily(
    # GLM-4.5 and 4.6: pull request 58.
    name="glm4_moe",
    model_types=("glm4_moe",),
    converter="*.modeling_glm4_moe:convert_glm4_moe_hf_to_neuron_state_dict",
    num_experts=_ROUTED,
    intermediate_size=_MOE_SIZE,
)

DEEPSEEK_V3 = MoEFamily(
    # contrib/models/DeepSeek-V3.
    name="deepseek_v3",
    model_types=("deepseek_v3",),
    converter="*.modeling_deepseek:convert_deepseek_v3_hf_to_neuron_state_dict",
    renamed_linears=(),
    # It dequantizes blocks (weight_scale_inv), and leaves scales of channels as they are.
    converter_knows_scales=True,
    full_precision=_MLA,
    num_experts=_ROUTED,
    intermediate_size=_MOE_SIZE,
)

MINIMAX_M2 = MoEFamily(
    # Pull request 138.
    name="minimax_m2",
    model_types=("minimax_m2",),
    converter="*.modeling_minimax_m2:convert_minimax_m2_hf_to_neuron_state_dict",
    experts="layers.{layer}.block_sparse_moe.experts",
    router="layers.{layer}.block_sparse_moe.gate",
    expert_mlps="layers.{layer}.block_sparse_moe.expert_mlps",
    gate="w1",
    up="w3",
    down="w2",
    # Those of blocks that its own script writes already fused, and of the attention.
    converter_knows_scales=True,
    num_experts=("num_local_experts",),
    intermediate_size=("intermediate_size",),
)

OLMOE = MoEFamily(
    # Pull request 78.
    name="olmoe",
    model_types=("olmoe",),
    converter="*.modeling_olmoe:convert_olmoe_hf_to_neuron_state_dict",
    num_experts=("num_experts",),
    intermediate_size=("intermediate_size",),
    decoder=DecoderTraits(head_norm=False, normalizes_top_k=False, whole_norm=True),
)

SOLAR_OPEN = MoEFamily(
    # Pull request 65.
    name="solar_open",
    model_types=("solar_open",),
    converter="*.modeling_solar_open:convert_solar_open_hf_to_neuron_state_dict",
    num_experts=_ROUTED,
    intermediate_size=_MOE_SIZE,
)

MINICPM_MOE = MoEFamily(
    # MiniCPM-MoE-8x2B: pull request 89.
    name="minicpm_moe",
    model_types=("minicpm",),
    converter="*.modeling_minicpm_moe_neuronx:convert_minicpm_moe_hf_to_neuron_state_dict",
    gate="w1",
    up="w3",
    down="w2",
    num_experts=("num_experts",),
    intermediate_size=("intermediate_size",),
)

SARVAM_MOE = MoEFamily(
    # sarvam-30b: pull request 83.
    name="sarvam_moe",
    model_types=("sarvam_moe",),
    converter="*.modeling_sarvam:convert_sarvam_hf_to_neuron_state_dict",
    embeddings="word_embeddings",
    renamed_linears=(
        RenamedLinear(
            "layers.{layer}.attention.query_key_value", ("layers.{layer}.self_attn.qkv_proj.Wqkv",)
        ),
        RenamedLinear(
            "layers.{layer}.attention.dense", ("layers.{layer}.self_attn.o_proj.o_proj",)
        ),
    ),
    # The converter moves the weights of the shared experts, and leaves their scales.
    full_precision=("shared_experts",),
    num_experts=("num_experts",),
    intermediate_size=_MOE_SIZE,
)

MIMO_V2 = MoEFamily(
    # MiMo-V2-Flash: pull request 137.
    name="mimo_v2",
    model_types=("mimo_v2_flash",),
    converter="*.modeling_mimo_v2:convert_mimo_v2_hf_to_neuron_state_dict",
    renamed_linears=(),
    converter_knows_scales=True,
    # The converter leaves it, and the router would add what it was initialised with.
    renames=(
        (
            "layers.{layer}.mlp.gate.e_score_correction_bias",
            "layers.{layer}.mlp.router.e_score_correction_bias",
        ),
    ),
    layer_types="hybrid_layer_pattern",
    num_experts=_ROUTED,
    intermediate_size=_MOE_SIZE,
)

QWEN3_NEXT = MoEFamily(
    # Qwen3-Coder-Next and Qwen3-Next: pull request 170.
    name="qwen3_next",
    model_types=("qwen3_next",),
    converter="*.modeling_qwen35_moe:convert_qwen35_hf_to_neuron_state_dict",
    # It splits and fuses those of both attentions without their scales.
    full_precision=("linear_attn", "self_attn", "shared_expert"),
    num_experts=("num_experts",),
    intermediate_size=_MOE_SIZE,
)

QWEN3_OMNI_MOE = MoEFamily(
    # The thinker of Qwen3-Omni-30B-A3B: pull request 167.
    name="qwen3_omni_moe",
    model_types=("qwen3_omni_moe",),
    converter="*.modeling_qwen3_omni_moe:convert_qwen3_omni_moe_hf_to_neuron_state_dict",
    experts="thinker.model.layers.{layer}.mlp.experts",
    router="thinker.model.layers.{layer}.mlp.gate",
    renamed_linears=attention_linears(
        "thinker.model.layers.{layer}.self_attn", "layers.{layer}.self_attn"
    ),
    embeddings="thinker.model.embed_tokens",
    final_norm="thinker.model.norm",
    head="thinker.lm_head",
    prefixes=("",),
    # Parts that are models of their own.
    full_precision=("thinker.visual", "thinker.audio_tower", "talker.", "code2wav."),
    config_path=("thinker_config", "text_config"),
    num_experts=("num_experts",),
    intermediate_size=_MOE_SIZE,
)

KIMI_K2 = MoEFamily(
    # Kimi-K2-Instruct-0905: pull request 131.
    name="kimi_k2",
    model_types=("kimi_k2",),
    converter="*.modeling_kimi_k2:convert_kimi_k2_hf_to_neuron_state_dict",
    own_loader="NeuronKimiK2ForCausalLM.checkpoint_loader_fn",
    renamed_linears=(),
    # Those of blocks, as in the published checkpoint.
    converter_knows_scales=True,
    full_precision=_MLA,
    renames=(
        # To where its own loader has it; the converter names a parameter that there is not.
        (
            "layers.{layer}.mlp.gate.e_score_correction_bias",
            "layers.{layer}.mlp.router.linear_router.bias",
        ),
        # The converter leaves their scales.
        ("layers.{layer}.mlp.shared_experts", "layers.{layer}.shared_experts"),
    ),
    num_experts=_ROUTED,
    intermediate_size=_MOE_SIZE,
)

CONTRIBUTED: tuple[MoEFamily, ...] = (
    GLM4_MOE,
    DEEPSEEK_V3,
    MINIMAX_M2,
    OLMOE,
    SOLAR_OPEN,
    MINICPM_MOE,
    SARVAM_MOE,
    MIMO_V2,
    QWEN3_NEXT,
    QWEN3_OMNI_MOE,
    KIMI_K2,
)
