"""The releases of NxDI that this package is tested on."""

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
