"""The models of NxDI that cannot have one scale per expert, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class UnsupportedModel:
    """A mixture-of-experts model of NxDI that cannot have one FP8 scale per expert.

    Attributes:
        model_types: Values of ``model_type`` in ``config.json``.
        module: NxDI's module that defines its config.
        reason: Why it cannot.
        remedy: What to do instead.
    """

    model_types: tuple[str, ...]
    module: str
    reason: str
    remedy: str


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
        if model_type in model.model_types or (not model_type and model.module in modules):
            return model
    return None
