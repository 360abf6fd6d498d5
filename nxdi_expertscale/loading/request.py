"""What a state dict is loaded for: the sizes of the model, and how its experts are to be read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LoadRequest:
    """What NxDI's two configs say about the state dict that is converted.

    Attributes:
        num_layers: Number of decoder layers.
        num_experts: Number of experts in a layer; None where the config does not say.
        flag: Whether ``expert_wise_scale`` is on.
        expert_wise: Whether each expert keeps its own scale: by the flag, or by NxDI's own
            quantization type. Otherwise the scales are averaged.
        exclusions: ``modules_to_not_convert``.
        quantization_dtype: The setting's value, for messages.
        quantized_dtype: The dtype that it stands for; None where it names none.
        torch_dtype: The dtype of what is not quantized; None for float32.
        hybrid_sharding: Whether NxD has a second set of each layer's experts.
        checked_tensors: Names, as the checkpoint has them, of the tensors of a finished folder of
            ours, whose weights are within Neuron's range; empty for any other checkpoint.
    """

    num_layers: int
    num_experts: int | None
    flag: bool
    expert_wise: bool
    exclusions: tuple[str, ...] = ()
    quantization_dtype: str = "f8e4m3"
    quantized_dtype: torch.dtype | None = None
    torch_dtype: torch.dtype | None = None
    hybrid_sharding: bool = False
    checked_tensors: Collection[str] = ()


class LayoutError(Exception):
    """NxDI names or fuses the experts in another way than this package knows.

    The patch that meets it raises :class:`~nxdi_expertscale.errors.IncompatibleUpstreamError`
    with the name of its seam.
    """
