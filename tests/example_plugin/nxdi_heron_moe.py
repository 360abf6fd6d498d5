"""Heron MoE, a made-up model, whose code for NxDI is ``contribution/modeling_heron.py``.

Its checkpoints hold a layer's experts as one tensor for each fused weight, and the converter reads
them so. Beside the experts there is a shared one, and beside the language model a vision tower.
"""

from __future__ import annotations

from collections.abc import Iterable

from nxdi_expertscale import MoEFamily, Stacking, hookimpl

HERON_MOE = MoEFamily(
    name="heron_moe",
    model_types=("heron", "heron_text"),
    converter="*.modeling_heron:convert_heron_hf_to_neuron_state_dict",
    experts="layers.{layer}.feed_forward.experts",
    router="layers.{layer}.feed_forward.router",
    expert_mlps="layers.{layer}.mlp.moe.expert_mlps",
    prefixes=("model.language_model.", "model.", ""),
    stacked=Stacking.OUTPUTS_FIRST,
    converter_reads_stacked=True,
    # The converter renames the weights of the former, and leaves their scales; the latter is not
    # the language model's.
    full_precision=("shared_expert", "visual"),
    num_experts=("num_experts",),
    intermediate_size=("moe_intermediate_size",),
)


@hookimpl
def nxdi_moe_families() -> Iterable[MoEFamily]:
    """Contribute the family."""
    return [HERON_MOE]
