"""A checkpoint on disk: read, plan, quantize in a stream, write, resume, verify."""

from nxdi_expertscale.checkpoint.inspect import Inspection, inspect_checkpoint
from nxdi_expertscale.checkpoint.neuron_config import NeuronSettings, neuron_settings
from nxdi_expertscale.checkpoint.origin import mismatch
from nxdi_expertscale.checkpoint.quantize import QuantizationResult, quantize_checkpoint
from nxdi_expertscale.checkpoint.verify import Verification, verify_checkpoint
from nxdi_expertscale.checkpoint.write.manifest import Manifest, is_untouched, read_manifest

__all__ = [
    "Inspection",
    "Manifest",
    "NeuronSettings",
    "QuantizationResult",
    "Verification",
    "inspect_checkpoint",
    "is_untouched",
    "mismatch",
    "neuron_settings",
    "quantize_checkpoint",
    "read_manifest",
    "verify_checkpoint",
]
