"""The releases of NxDI and of vLLM-Neuron that were tested, and what belongs together."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """A release of NxDI.

    Attributes:
        nxdi: Its version's first two numbers.
        nxd: The same of the NxD that belongs to it.
        sdk: The Neuron SDK that it is part of.
    """

    nxdi: str
    nxd: str
    sdk: str


RELEASES = (
    Release("0.5", "0.14", "2.25"),
    Release("0.6", "0.15", "2.26"),
    Release("0.7", "0.16", "2.27"),
    Release("0.8", "0.17", "2.28"),
    Release("0.9", "0.18", "2.29"),
)


@dataclass(frozen=True)
class VllmNeuronRelease:
    """A release of vLLM-Neuron that runs models through NxDI.

    Attributes:
        version: Its version's three numbers.
        vllm: The vLLM that it pins.
        nxdi: The first two numbers of the versions of NxDI that it goes with.
        sdk: The Neuron SDK that it is part of.
    """

    version: str
    vllm: str
    nxdi: tuple[str, ...]
    sdk: str


VLLM_NEURON_RELEASES = (
    VllmNeuronRelease("0.2.0", "0.11.0", ("0.6", "0.7"), "2.26"),
    VllmNeuronRelease("0.2.2", "0.11.0", ("0.7",), "2.27"),
    VllmNeuronRelease("0.4.1", "0.13.0", ("0.8",), "2.28"),
    VllmNeuronRelease("0.5.0", "0.16.0", ("0.9", "0.10"), "2.29 to 2.31"),
)

WITHOUT_SOURCES = {"0.10": "2.30 and 2.31"}
"""The Neuron SDKs of the releases of NxDI that have no public sources to test on."""


def vllm_neuron_release_of(version: str | None) -> VllmNeuronRelease | None:
    """The tested release that a version of vLLM-Neuron is, or None.

    Args:
        version: The version, such as ``0.2.2+lts``; None where it is absent.
    """
    match = re.match(r"\d+\.\d+\.\d+", version or "")
    number = match[0] if match else None
    return next((item for item in VLLM_NEURON_RELEASES if item.version == number), None)


def release_of(nxdi_version: str | None) -> Release | None:
    """The tested release that a version of NxDI belongs to, or None.

    Args:
        nxdi_version: The version, such as ``0.9.17334+abc``; None where NxDI is absent.
    """
    number = minor_version(nxdi_version)
    return next((release for release in RELEASES if release.nxdi == number), None)


def minor_version(version: str | None) -> str | None:
    """The first two numbers of a version: ``0.9`` of ``0.9.17334+abc``; None if it has none."""
    match = re.match(r"\d+\.\d+", version or "")
    return match[0] if match else None
