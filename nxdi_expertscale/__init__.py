"""One FP8 scale per expert for mixture-of-experts models on AWS Trainium.

Importing this package activates it: every installed plugin that ``NXDI_PLUGINS`` allows is put
in force. It imports neither torch nor NxDI; the patches are applied when NxDI is imported.
"""

# Before any other import, also that of __future__, which is a file like any other.
from nxdi_expertscale import working_directory

if working_directory.is_run_as_module():
    working_directory.leave_off_path()

from typing import TYPE_CHECKING, Any

from nxdi_expertscale.activation import activate, deactivate, status
from nxdi_expertscale.errors import (
    CheckpointError,
    ConfigurationError,
    ExpertScaleError,
    IncompatibleUpstreamError,
)
from nxdi_expertscale.families.declaration import MoEFamily, Stacking
from nxdi_expertscale.hooking.patch import Patch, SeamStatus, State
from nxdi_expertscale.plugins.hookspecs import hookimpl
from nxdi_expertscale.version import __version__

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint import quantize_checkpoint

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ExpertScaleError",
    "IncompatibleUpstreamError",
    "MoEFamily",
    "Patch",
    "SeamStatus",
    "Stacking",
    "State",
    "__version__",
    "activate",
    "deactivate",
    "hookimpl",
    "quantize_checkpoint",
    "status",
]


def __getattr__(name: str) -> Any:
    if name == "quantize_checkpoint":
        # It needs torch, which importing this package must not import.
        from nxdi_expertscale.checkpoint import quantize_checkpoint

        return quantize_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


activate()
