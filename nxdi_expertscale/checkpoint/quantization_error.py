"""The error of quantized weights against their source, as signal to noise, by layer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OUTSIDE_LAYERS = "head"
"""What stands for a layer where a tensor belongs to none."""

MIN_SNR_DB = 24.0
"""Least signal to noise of a weight that is E4M3 with a scale for each channel, in dB.

E4M3 rounds a value by 2^-4 of it at most, which is 24.08 dB. Values below its normal range are
rounded by 2^-10 of the scale, and a channel's largest one is 240 of it: of no account.
"""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class LayerError:
    """How far a layer's quantized weights are from the source's.

    Attributes:
        layer: Its number, or :data:`OUTSIDE_LAYERS`.
        snr_db: Signal to noise over all its quantized weights, in dB; None if they are equal.
        worst_tensor: The weight with the least.
        worst_snr_db: Its signal to noise, in dB; None if it is equal.
    """

    layer: str
    snr_db: float | None
    worst_tensor: str
    worst_snr_db: float | None


class ErrorSums:
    """Signal and noise of weights, summed up chunk by chunk, from several threads."""

    def __init__(self) -> None:
        self._signal: dict[str, list[float]] = defaultdict(list)
        self._noise: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, reference: torch.Tensor, values: torch.Tensor) -> None:
        """Add a chunk of a weight. Its values are overwritten.

        Args:
            name: The weight's name.
            reference: What the source has, ``[rows, columns]``, ``torch.float32``.
            values: What the quantized weight means, of the same shape and dtype.
        """
        self._signal[name].append(_energy(reference))
        self._noise[name].append(_energy(values.sub_(reference)))

    def add_energies(self, name: str, signal: float, noise: float) -> None:
        """Add a part of a weight whose energies are known."""
        self._signal[name].append(signal)
        self._noise[name].append(noise)

    def by_tensor(self) -> dict[str, float]:
        """Signal to noise of each weight, in dB; infinite where it is equal."""
        return {
            name: _snr(math.fsum(self._signal[name]), math.fsum(self._noise[name]))
            for name in sorted(self._signal)
        }

    def by_layer(self) -> tuple[LayerError, ...]:
        """The error of each layer, those outside the layers last."""
        # Exact sums: they do not depend on the order in which the threads came.
        signal = {name: math.fsum(parts) for name, parts in self._signal.items()}
        noise = {name: math.fsum(parts) for name, parts in self._noise.items()}
        layers: dict[str, list[str]] = defaultdict(list)
        for name in sorted(signal):
            match = _LAYER.search(name)
            layers[match[1] if match else OUTSIDE_LAYERS].append(name)
        errors = []
        for layer in sorted(layers, key=lambda layer: (not layer.isdigit(), layer.zfill(9))):
            names = layers[layer]
            snrs = {name: _snr(signal[name], noise[name]) for name in names}
            worst = min(names, key=snrs.__getitem__)
            snr = _snr(math.fsum(signal[n] for n in names), math.fsum(noise[n] for n in names))
            errors.append(LayerError(layer, _finite(snr), worst, _finite(snrs[worst])))
        return tuple(errors)


def decibels(snr_db: float | None) -> str:
    """A signal to noise of a :class:`LayerError` as a text."""
    return "exact" if snr_db is None else f"{snr_db:.1f} dB"


def _energy(values: torch.Tensor) -> float:
    flat = values.view(-1)
    return float(flat.dot(flat))


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _snr(signal: float, noise: float) -> float:
    """Signal to noise in dB; infinite without noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(signal, 1e-300) / noise)
