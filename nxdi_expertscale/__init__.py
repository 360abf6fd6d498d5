"""One FP8 scale per expert for mixture-of-experts models on AWS Trainium.

Importing this package activates it: every installed plugin that ``NXDI_PLUGINS`` allows is put
in force. It imports neither torch nor NxDI; the patches are applied when NxDI is imported.
"""

# Before any other import, also that of __future__, which is a file like any other.
from nxdi_expertscale import working_directory

if working_directory.is_run_as_module():
    working_directory.leave_off_path()

import importlib
from typing import TYPE_CHECKING, Any

from nxdi_expertscale.activation import activate, deactivate, status
from nxdi_expertscale.errors import (
    CheckpointError,
    CheckpointInUseError,
    ConfigurationError,
    ExpertScaleError,
    IncompatibleUpstreamError,
)
from nxdi_expertscale.families.declaration import DecoderTraits, MoEFamily, Stacking
from nxdi_expertscale.families.limits import Effect, Limit
from nxdi_expertscale.families.linears import RenamedLinear, attention_linears
from nxdi_expertscale.hooking.patch import Patch, SeamStatus, State
from nxdi_expertscale.plugins.hookspecs import hookimpl
from nxdi_expertscale.version import __version__

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint import (
        inspect_checkpoint,
        neuron_settings,
        quantize_checkpoint,
        verify_checkpoint,
    )
    from nxdi_expertscale.evaluation.evaluate import evaluate_checkpoint

__all__ = [
    "CheckpointError",
    "CheckpointInUseError",
    "ConfigurationError",
    "DecoderTraits",
    "Effect",
    "ExpertScaleError",
    "IncompatibleUpstreamError",
    "Limit",
    "MoEFamily",
    "Patch",
    "RenamedLinear",
    "SeamStatus",
    "Stacking",
    "State",
    "__version__",
    "activate",
    "attention_linears",
    "deactivate",
    "evaluate_checkpoint",
    "hookimpl",
    "inspect_checkpoint",
    "neuron_settings",
    "quantize_checkpoint",
    "status",
    "verify_checkpoint",
]

_IMPORTED_WHEN_USED = {
    "evaluate_checkpoint": "nxdi_expertscale.evaluation.evaluate",
    "inspect_checkpoint": "nxdi_expertscale.checkpoint",
    "neuron_settings": "nxdi_expertscale.checkpoint",
    "quantize_checkpoint": "nxdi_expertscale.checkpoint",
    "verify_checkpoint": "nxdi_expertscale.checkpoint",
}
"""Where the names are that need torch, which importing this package must not import."""


def __getattr__(name: str) -> Any:
    if name in _IMPORTED_WHEN_USED:
        return getattr(importlib.import_module(_IMPORTED_WHEN_USED[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__]


activate()
