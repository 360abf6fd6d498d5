"""Qwen3.5 MoE, which NxDI has as a contribution: ``contrib/models/Qwen3.5-35B-A3B``.

Its checkpoints hold a layer's experts as one tensor for each fused weight, and the converter of
the contribution (``modeling_qwen35.py``) reads them so.
"""

from __future__ import annotations

from collections.abc import Iterable

from nxdi_expertscale import MoEFamily, Stacking, hookimpl

QWEN3_5_MOE = MoEFamily(
    name="qwen3_5_moe",
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    converter="modeling_qwen35:convert_qwen35_hf_to_neuron_state_dict",
    expert_mlps="layers.{layer}.mlp.moe.expert_mlps",
    prefixes=("model.language_model.", "model.", ""),
    stacked=Stacking.OUTPUTS_FIRST,
    converter_reads_stacked=True,
    # It fuses those of the attention.
    converter_knows_scales=True,
    # The converter renames these weights and leaves their scales where they are.
    full_precision=("shared_expert", "visual", "mtp"),
    num_experts=("num_experts",),
    intermediate_size=("moe_intermediate_size",),
)


@hookimpl
def nxdi_moe_families() -> Iterable[MoEFamily]:
    """Contribute the family."""
    return [QWEN3_5_MOE]
