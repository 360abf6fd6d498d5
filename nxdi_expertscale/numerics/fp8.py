"""Neuron's FP8: E4M3 that ends at ±240, one float32 scale for each output channel.

The numbers are those of NxD's own quantization step, bit for bit
(``neuronx_distributed/quantization/quantization_utils.py``, ``quantize_fp8_per_channel``).
OCP's E4M3 goes on to ±448; what lies between reads as infinity or NaN on the device.
"""

from __future__ import annotations

import torch

QUANTIZED_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
"""The dtypes of a quantized weight that NxD knows and that have a scale per channel."""

E4M3_MAX = 240.0
"""Largest magnitude that Neuron's E4M3 holds."""

MIN_SCALE = 1e-5
"""Smallest scale; an output channel of zeros gets it."""

SMALLEST_NORMAL = 2.0**-6
"""Smallest magnitude that E4M3 holds with all of its three bits after the point."""

_LAST_BYTE = 0x77
"""The magnitude bits of ±240; more is beyond Neuron's range."""

_NAN_BYTE = 0x7F
"""The magnitude bits of NaN."""

_ALL_BUT_TOP_EXPONENT_BIT = ~0x4000


def scale_per_channel(values: torch.Tensor) -> torch.Tensor:
    """The scale of each output channel of a weight.

    Args:
        values: ``[..., out, in]``, of any float dtype.

    Returns:
        ``[..., out, 1]``, ``torch.float32``; not finite where a channel has NaN or infinity.
    """
    # The largest magnitude, without a temporary as large as the weight.
    largest = torch.maximum(values.amax(dim=-1, keepdim=True), -values.amin(dim=-1, keepdim=True))
    return (largest.to(torch.float32) / E4M3_MAX).clamp_min(MIN_SCALE)


def quantize_per_channel(
    weight: torch.Tensor, *, scratch: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight with one scale for each output channel.

    Args:
        weight: ``[out, in]``, or ``[..., out, in]`` for several at once, of any float dtype.
        scratch: ``torch.float32`` of the same shape to work in, overwritten; it may be ``weight``
            itself. Without it one is allocated.
        out: ``torch.float8_e4m3fn`` of the same shape for the result.

    Returns:
        The weight as ``torch.float8_e4m3fn`` within ±240, of the same shape, and its scale
        as ``torch.float32``, ``[..., out, 1]``; ``weight ≈ quantized * scale``. A channel with
        NaN or infinity has a scale that is not finite.
    """
    values = torch.empty_like(weight, dtype=torch.float32) if scratch is None else scratch
    values.copy_(weight)
    scale = scale_per_channel(values)
    # No clamp: a quotient is above 240 by a rounding error at most, and the cast rounds it to 240.
    values.div_(scale)
    quantized = torch.empty_like(weight, dtype=torch.float8_e4m3fn) if out is None else out
    return quantized.copy_(values), scale


def energies(
    quotients: torch.Tensor, quantized: torch.Tensor, scale: torch.Tensor
) -> tuple[float, float]:
    """The energy of quantized rows, and that of what rounding them to E4M3 cost.

    Args:
        quotients: ``[out, in]``, float32 weights divided by their scales.
        quantized: ``torch.float8_e4m3fn`` of the same shape: the quotients, rounded.
        scale: ``[out, 1]``, ``torch.float32``.

    Returns:
        The sums of the squares of the weights, and of their differences.
    """
    rounded = decode(quantized, out=torch.empty_like(quotients))
    signal, noise = (quotients * scale).view(-1), ((rounded - quotients) * scale).view(-1)
    return float(torch.dot(signal, signal)), float(torch.dot(noise, noise))


def has_rows_below_floor(quotients: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether any output channel lost its precision to the floor of the scale.

    A channel whose magnitudes are all below ``MIN_SCALE * 2**-6`` gets the smallest scale, and
    what is left of it are E4M3's smallest values, or zeros: more than E4M3's rounding is lost.

    Args:
        quotients: ``[out, in]``, float32 weights divided by their scales, before or after they
            are rounded to E4M3.
        scale: ``[out, 1]``, ``torch.float32``.
    """
    at_floor = (scale == MIN_SCALE).squeeze(-1)
    if not bool(at_floor.any()):
        return False
    largest = quotients[at_floor].abs().amax(dim=-1)
    return bool(((largest > 0) & (largest < SMALLEST_NORMAL)).any())


def has_rows_too_small(values: torch.Tensor) -> bool:
    """Whether any output channel is so small that quantizing would lose it.

    The same question as :func:`has_rows_below_floor`, of weights that are not quantized.

    Args:
        values: ``[out, in]``, of any float dtype.
    """
    largest = torch.maximum(values.amax(dim=-1), -values.amin(dim=-1))
    return bool(((largest > 0) & (largest < MIN_SCALE * SMALLEST_NORMAL)).any())


def decode(weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Turn E4M3 into float32, many times as fast as torch's cast does (2.13, on a CPU).

    Args:
        weight: ``torch.float8_e4m3fn``, of any shape.
        out: ``torch.float32`` of the same shape for the result.
    """
    # float16 has one exponent bit more and seven mantissa bits more: moved to their places, the
    # bits of E4M3 are those of float16, with a bias of the exponent that is smaller by 8. That
    # holds for subnormal numbers too, and for all but NaN.
    bits = weight.view(torch.int8).to(torch.int16)
    bits.bitwise_left_shift_(7).bitwise_and_(_ALL_BUT_TOP_EXPONENT_BIT)
    out.copy_(bits.view(torch.float16)).mul_(256.0)
    if _has_nan(weight):
        out.masked_fill_((weight.view(torch.uint8) & 0x7F) == 0x7F, torch.nan)
    return out


def halve(
    weight: torch.Tensor, *, scratch: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Bring E4M3 in the range of GPUs (±448) into Neuron's: half of each value.

    With a scale that is doubled the weight means what it meant. That is exact but for values below
    2^-5: half of an odd multiple of 2^-9 is not in E4M3, and is rounded to even.

    Args:
        weight: ``torch.float8_e4m3fn``, of any shape.
        scratch: ``torch.float32`` of the same shape, overwritten.
        out: ``torch.float8_e4m3fn`` of the same shape for the result.

    Returns:
        ``torch.float8_e4m3fn`` of the same shape, within ±224; NaN stays NaN.
    """
    values = torch.empty_like(weight, dtype=torch.float32) if scratch is None else scratch
    decode(weight, out=values).mul_(0.5)
    halved = torch.empty_like(weight) if out is None else out
    return halved.copy_(values)


def scale_blocks_(values: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Multiply rows in place by scales of which each holds for a block of columns.

    Args:
        values: ``[rows, in]``, ``torch.float32``.
        scale: ``[rows, ceil(in / block)]``, ``torch.float32``; the last block may be cut.
        block: Columns that share a scale.
    """
    whole = values.shape[1] // block
    edge = whole * block
    values[:, :edge].view(values.shape[0], whole, block).mul_(scale[:, :whole, None])
    values[:, edge:].mul_(scale[:, whole:])
    return values


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Values of a quantized weight, as ``torch.float32``.

    Args:
        weight: ``[..., out, in]``, of any dtype.
        scale: What broadcasts to it, such as ``[..., out, 1]``.
    """
    values = torch.empty_like(weight, dtype=torch.float32)
    if weight.dtype == torch.float8_e4m3fn and weight.device.type == "cpu":
        decode(weight, out=values)
    else:
        values.copy_(weight)
    # In place: fresh memory for the product takes longer than all else.
    return values.mul_(scale.to(torch.float32))


def exceeds_range(weight: torch.Tensor) -> bool:
    """Whether an E4M3 tensor holds a value that Neuron reads as infinity or NaN.

    Args:
        weight: ``torch.float8_e4m3fn``, of any shape.
    """
    return _largest_magnitude_byte(weight) > _LAST_BYTE


def _has_nan(weight: torch.Tensor) -> bool:
    return _largest_magnitude_byte(weight) == _NAN_BYTE


def _largest_magnitude_byte(weight: torch.Tensor) -> int:
    """The largest byte of an E4M3 tensor, the sign bit aside; they are ordered as magnitudes."""
    if weight.numel() == 0:
        return 0
    # Read as a signed byte the largest is the largest of the positive values, and read as an
    # unsigned one that of the negative values, if there are any: two reductions, no temporary.
    positive = int(weight.view(torch.int8).max())
    negative = int(weight.view(torch.uint8).max()) - 0x80
    return max(positive, negative)


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight holds quantized values, which mean nothing without their scale."""
    return weight.dtype in QUANTIZED_DTYPES
