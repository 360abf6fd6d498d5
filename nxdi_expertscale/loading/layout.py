"""What is said of an NxDI that is not the one that this package knows."""

from __future__ import annotations


class LayoutError(Exception):
    """NxDI names or fuses the experts in another way than this package knows.

    The patch that meets it raises :class:`~nxdi_expertscale.errors.IncompatibleUpstreamError`
    with the name of its seam.
    """
