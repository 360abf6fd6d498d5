"""A checkpoint on disk: read, plan, quantize in a stream, write, resume, verify.

Its functions are imported when they are used: most need torch, which takes seconds to import, and
what finds a request or a folder wrong does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint.dry_run import DryRun, run_dry
    from nxdi_expertscale.checkpoint.finished import check_finished
    from nxdi_expertscale.checkpoint.inspect import Inspection, inspect_checkpoint
    from nxdi_expertscale.checkpoint.neuron_config import NeuronSettings, neuron_settings
    from nxdi_expertscale.checkpoint.origin import mismatch
    from nxdi_expertscale.checkpoint.quantize import QuantizationResult, quantize_checkpoint
    from nxdi_expertscale.checkpoint.verify import Verification, verify_checkpoint
    from nxdi_expertscale.checkpoint.write.manifest import Manifest, read_manifest

__all__ = [
    "DryRun",
    "Inspection",
    "Manifest",
    "NeuronSettings",
    "QuantizationResult",
    "Verification",
    "check_finished",
    "inspect_checkpoint",
    "mismatch",
    "neuron_settings",
    "quantize_checkpoint",
    "read_manifest",
    "run_dry",
    "verify_checkpoint",
]

_MODULES = {
    "DryRun": "dry_run",
    "Inspection": "inspect",
    "Manifest": "write.manifest",
    "NeuronSettings": "neuron_config",
    "QuantizationResult": "quantize",
    "Verification": "verify",
    "check_finished": "finished",
    "inspect_checkpoint": "inspect",
    "mismatch": "origin",
    "neuron_settings": "neuron_config",
    "quantize_checkpoint": "quantize",
    "read_manifest": "write.manifest",
    "run_dry": "dry_run",
    "verify_checkpoint": "verify",
}
"""Where each name is, below this package."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
