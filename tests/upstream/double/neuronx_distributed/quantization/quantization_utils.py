"""Quantization of a Hugging Face model in memory: every ``nn.Linear`` that is not excluded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

_BOUNDS = {torch.float8_e4m3fn: 240.0, torch.float8_e5m2: torch.finfo(torch.float8_e5m2).max}


class QuantizedLinear(nn.Module):
    """Weight ``[out, in]`` and scale, as they go to the checkpoint."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)


def quantize_fp8_per_channel(
    tensor: torch.Tensor, dtype: torch.dtype, channel_axis: int
) -> tuple[torch.Tensor, torch.Tensor]:
    bound = _BOUNDS[dtype]
    others = [axis for axis in range(tensor.ndim) if axis != channel_axis]
    values = tensor.to(torch.float32)
    scale = (values.abs().amax(dim=others, keepdim=True) / bound).clamp_min(1e-5)
    return (values / scale).clamp(-bound, bound).to(dtype), scale


def quantize_pytorch_model_per_channel_symmetric(
    float_model: nn.Module,
    inplace: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    modules_to_not_convert: Sequence[str] | None = None,
) -> nn.Module:
    assert inplace
    for name, module in list(float_model.named_modules()):
        if type(module) is not nn.Linear or any(
            part in name for part in modules_to_not_convert or ()
        ):
            continue
        parent, _, last = name.rpartition(".")
        weight, scale = quantize_fp8_per_channel(module.weight.detach(), dtype, 0)
        setattr(float_model.get_submodule(parent), last, QuantizedLinear(weight, scale))
    return float_model
