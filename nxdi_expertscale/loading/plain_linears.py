"""Quantized weights of linear layers that NxDI never converts, made numbers again.

NxD's ``convert`` knows its own parallel layers alone (``quantization/quantization_mappings.py``).
An ``nn.Linear`` beside them would read FP8 codes as numbers, hundreds of times off.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping

import torch
from torch import nn

from nxdi_expertscale.errors import CheckpointError
from nxdi_expertscale.loading.names import scale_of
from nxdi_expertscale.loading.threads import one_thread
from nxdi_expertscale.numerics import fp8, scales

_logger = logging.getLogger("nxdi_expertscale")


@one_thread()
def dequantize_plain_linears(
    model: nn.Module, state_dict: MutableMapping[str, torch.Tensor]
) -> None:
    """Dequantize the weights that a state dict has quantized for a plain ``nn.Linear``.

    Args:
        model: The model, its modules quantized.
        state_dict: The tensors after the model's preshard hooks, whole; changed in place. Those
            without values (``meta``) get the dtype alone.

    Raises:
        CheckpointError: A scale has another shape than ``[out, 1]``, ``[out]`` or one number.
    """
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        key = f"{path}.weight"
        weight, scale = state_dict.get(key), state_dict.get(scale_of(key))
        is_plain = type(module) is nn.Linear and not fp8.is_quantized(module.weight)
        if not is_plain or weight is None or scale is None or not fp8.is_quantized(weight):
            continue
        try:
            per_channel = scales.channel_scale(scale, weight.shape[0])
        except ValueError as error:
            raise CheckpointError(f"{scale_of(key)}: {error}") from error
        state_dict[key] = fp8.dequantize(weight, per_channel.T).to(module.weight.dtype)
        del state_dict[scale_of(key)]
        state_dict.pop(scale_of(f"{_copied_from(path)}.weight"), None)
        found.append((path, weight.is_meta))
    if found and not found[0][1]:
        _logger.warning(
            "%d layers are quantized in the checkpoint and plain nn.Linear in the model, which "
            "NxDI does not convert, and were dequantized: %s; name them in the family's "
            "full_precision, or in modules_to_not_convert, and quantize again",
            len(found),
            ", ".join(sorted({path.rpartition(".")[2] for path, _ in found})),
        )


def _copied_from(path: str) -> str:
    """Where the tensors of a module were before a preshard hook copied them one module deeper.

    NxDI's ``modules/attention/gqa.py`` makes ``self_attn.o_proj.o_proj.scale`` of
    ``self_attn.o_proj.scale``, and leaves the latter where it is.
    """
    *above, _, last = ("", *path.split("."))
    return ".".join((*above[1:], last))
