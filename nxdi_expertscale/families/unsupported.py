"""The models of NxDI, and contributions to it, that cannot have one scale per expert, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from nxdi_expertscale.hooking.module_names import matches_name


@dataclass(frozen=True)
class UnsupportedModel:
    """A mixture-of-experts model that cannot have one FP8 scale per expert.

    Attributes:
        model_types: Values of ``model_type`` in ``config.json``.
        module: NxDI's module that defines its config; ``*.module`` for a contributed one, which may
            be in any package.
        reason: Why it cannot.
        remedy: What to do instead.
        where: Where its code is in NxDI's repository, if it is contributed.
        line: The line there that decides it.
    """

    model_types: tuple[str, ...]
    module: str
    reason: str
    remedy: str
    where: str = ""
    line: str = ""

    @property
    def explanation(self) -> str:
        """Why it cannot, with the line that decides it."""
        return f"{self.reason} ({self.where}: {self.line})" if self.line else self.reason


_MOVE_THE_SCALE = (
    "run it in bfloat16, or have its converter keep the dtype of an expert's weight and move its "
    "scale with it, and declare a family for it"
)


UNSUPPORTED: tuple[UnsupportedModel, ...] = (
    UnsupportedModel(
        model_types=("dbrx",),
        module="neuronx_distributed_inference.models.dbrx.modeling_dbrx",
        reason=(
            "NxDI's converter for DBRX copies weights by name and drops every scale, so it loads "
            "no quantized DBRX at all"
        ),
        remedy="run it in bfloat16",
    ),
    UnsupportedModel(
        model_types=("gpt_oss",),
        module="neuronx_distributed_inference.models.gpt_oss.modeling_gpt_oss",
        reason=(
            "gpt-oss is quantized already: its experts are MXFP4, with a scale for every 32 "
            "values, and NxDI reads them in no other form"
        ),
        remedy="run the original checkpoint with quantized=False",
    ),
    UnsupportedModel(
        model_types=("glm_moe_dsa",),
        module="*.modeling_glm5",
        reason=(
            "the converter of GLM-5 and 5.2 quantizes experts itself, all with one scale, or casts "
            "FP8 ones to bfloat16 without a scale"
        ),
        remedy=(
            "run it as published, with expert_wise_scale off; for one scale per expert its "
            "converter has to keep FP8 experts and their scales, and its router's fused kernel to "
            "take a scale for each"
        ),
        where="contrib/models/GLM-5.2/src/modeling_glm5.py",
        line="gate_w = state_dict.pop(g_key).to(target_dtype)",
    ),
    UnsupportedModel(
        model_types=("afmoe",),
        module="*.modeling_trinity",
        reason="the converter of Trinity casts FP8 weights to bfloat16 and drops every scale",
        remedy=_MOVE_THE_SCALE,
        where="contrib/models/Trinity/src/modeling_trinity.py",
        line="gate_w = state_dict[gate_key].to(target_dtype)",
    ),
    UnsupportedModel(
        model_types=("phimoe",),
        module="*.modeling_phimoe",
        reason="the converter of Phi-3.5-MoE casts FP8 weights to bfloat16 and drops every scale",
        remedy=_MOVE_THE_SCALE,
        where="contrib/models/Phi-3.5-MoE-instruct/src/modeling_phimoe.py",
        line="target_dtype = torch.bfloat16",
    ),
    UnsupportedModel(
        model_types=("laguna",),
        module="*.modeling_laguna",
        reason="the converter of Laguna casts FP8 weights to bfloat16 and drops every scale",
        remedy=_MOVE_THE_SCALE,
        where="pull request 158, contrib/models/Laguna-XS.2/src/modeling_laguna.py",
        line="gate_w = state_dict[gate_k].to(target_dtype)",
    ),
    UnsupportedModel(
        model_types=("minimax_m3",),
        module="*.modeling_minimax_m3",
        reason=(
            "the converter of MiniMax-M3 takes the scale of an expert, and of a shared one, for "
            "its weight, and gives experts biases of their weights' dtype, which NxD adds to"
        ),
        remedy=(
            "run it in bfloat16, or have its converter keep scales apart from weights and make "
            "these biases in torch_dtype, and declare a family for it"
        ),
        where="contrib/models/MiniMax-M3/src/modeling_minimax_m3.py",
        line="expert_w_buf[l_idx][w_name][e_idx] = value",
    ),
)


def find_unsupported(
    model_type: str | None, modules: Collection[str] = ()
) -> UnsupportedModel | None:
    """A model that cannot have one scale per expert, if it is known as one.

    Args:
        model_type: The model's type, if it has one.
        modules: Modules that define its config, by which it is known where it has no type.
    """
    for model in UNSUPPORTED:
        if model_type in model.model_types:
            return model
        if not model_type and any(matches_name(model.module, name) for name in modules):
            return model
    return None
