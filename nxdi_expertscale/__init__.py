"""One FP8 scale per expert for mixture-of-experts models on AWS Trainium."""

from nxdi_expertscale.hookspecs import hookimpl
from nxdi_expertscale.version import __version__

__all__ = ["__version__", "hookimpl"]
