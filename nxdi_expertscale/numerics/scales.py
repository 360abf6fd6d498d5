"""Pure functions on the experts' scales: check, fuse, pad, average, compare. Imports torch alone.

The shapes are those of NxD's quantized expert layers
(``neuronx_distributed/quantization/quantization_layers.py``): ``[E, 1, dim]`` with one scale for
each expert and output channel, ``[1, 1, dim]`` with one that all experts share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def channel_scale(scale: torch.Tensor, out: int) -> torch.Tensor:
    """Bring one expert's scale to one form.

    Args:
        scale: ``[out, 1]`` or ``[out]``, or a scalar (``[]``, ``[1]``, ``[1, 1]``) that holds for
            every output channel. Any float dtype.
        out: Number of output channels of the expert's weight, ``[out, in]``.

    Returns:
        ``[1, out]``, ``torch.float32``.

    Raises:
        ValueError: Another shape, or a dtype that is no float.
    """
    if not scale.dtype.is_floating_point or scale.dtype.itemsize < 2:
        raise ValueError(f"a scale must be float32, float16 or bfloat16, not {scale.dtype}")
    if scale.numel() == 1 and scale.dim() <= 2:
        return scale.to(torch.float32).reshape(1, 1).expand(1, out)
    if tuple(scale.shape) not in ((out, 1), (out,)):
        raise ValueError(
            f"a scale of shape {list(scale.shape)} does not fit a weight with {out} output "
            f"channels; it must be [{out}, 1], [{out}] or one number"
        )
    return scale.to(torch.float32).reshape(1, out)


def are_valid(scales: torch.Tensor) -> bool:
    """Whether all of some scales are finite and positive.

    Args:
        scales: Of any shape, ``torch.float32``. On the device ``meta`` none is invalid.
    """
    if scales.numel() == 0 or scales.is_meta:
        return True
    # NaN goes into both extremes, and compares as false.
    smallest, largest = torch.aminmax(scales)
    return float(smallest) > 0 and float(largest) < float("inf")


def fuse(projections: Sequence[torch.Tensor]) -> torch.Tensor:
    """Fuse the scales of the projections that upstream fuses: gate, then up.

    Args:
        projections: Each ``[E, 1, out]``.

    Returns:
        ``[E, 1, sum of out]``, contiguous.
    """
    return torch.cat(list(projections), dim=2)


def average(scales: torch.Tensor) -> torch.Tensor:
    """Mean over the experts, as the one scale that a shared layout has room for.

    The experts are added one after the other: the same numbers, to the last bit, that NxDI's
    pull request 35 gives.

    Args:
        scales: ``[E, 1, dim]``, ``torch.float32``.

    Returns:
        ``[1, 1, dim]``, ``torch.float32``.
    """
    total = torch.zeros_like(scales[0])
    for scale in scales:
        total += scale
    return (total / scales.shape[0]).unsqueeze(0)


def pad(scales: torch.Tensor, width: int, parts: int) -> torch.Tensor:
    """Pad each fused part at its end with zeros, as upstream pads the weight.

    Args:
        scales: ``[E, 1, parts * out]``.
        width: Last dimension of the padded weight, ``parts * (out + padding)``.
        parts: Number of projections along the last axis: 2 for gate and up, 1 for down.

    Returns:
        ``[E, 1, width]``.

    Raises:
        ValueError: The width is no padding of the scales.
    """
    present = scales.shape[2]
    if width == present:
        return scales
    if width < present or width % parts:
        raise ValueError(f"scales of {present} channels cannot be padded to {width}")
    split = scales.reshape(scales.shape[0], 1, parts, present // parts)
    padding = (width - present) // parts
    return torch.nn.functional.pad(split, (0, padding)).reshape(scales.shape[0], 1, width)


@dataclass(frozen=True)
class Spread:
    """How far the experts' scales of one output channel lie apart, largest over smallest.

    Attributes:
        median: Of the channels.
        largest: Over the channels.
    """

    median: float
    largest: float


def spread(scales: torch.Tensor) -> Spread:
    """How far the experts' scales lie apart; 1.0 where a shared scale loses nothing.

    Args:
        scales: ``[E, 1, dim]``, finite and positive.
    """
    ratio = scales.amax(dim=0) / scales.amin(dim=0)
    return Spread(median=float(ratio.median()), largest=float(ratio.max()))


def relative_to_average(scales: torch.Tensor) -> torch.Tensor:
    """Each expert's scale over the mean of all, the median of its channels.

    Args:
        scales: ``[E, 1, dim]``, finite and positive.

    Returns:
        ``[E]``; 1.0 where an expert's scale is the mean.
    """
    return (scales / average(scales)).squeeze(1).median(dim=1).values


def error_of_average(scales: torch.Tensor, energy: torch.Tensor) -> float:
    """Relative error (Frobenius norm) of weights that are read with the mean of the scales.

    Each weight is quantized with its own scale, and read with the one that all experts share:
    a channel is off by the factor between the two. What rounding adds is left out.

    Args:
        scales: ``[E, 1, dim]``, finite and positive.
        energy: Sum of the squares of each channel's weights, ``[E, 1, dim]``.
    """
    error = energy * (average(scales) / scales - 1).square()
    total = float(energy.sum(dtype=torch.float64))
    return float((error.sum(dtype=torch.float64) / total).sqrt()) if total > 0 else 0.0
