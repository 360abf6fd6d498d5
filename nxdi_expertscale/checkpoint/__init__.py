"""A checkpoint on disk: read, plan, quantize in a stream, write, resume, verify."""

from nxdi_expertscale.checkpoint.finished import check_finished
from nxdi_expertscale.checkpoint.inspect import Inspection, inspect_checkpoint
from nxdi_expertscale.checkpoint.neuron_config import NeuronSettings, neuron_settings
from nxdi_expertscale.checkpoint.origin import mismatch
from nxdi_expertscale.checkpoint.quantize import QuantizationResult, quantize_checkpoint
from nxdi_expertscale.checkpoint.verify import Verification, verify_checkpoint
from nxdi_expertscale.checkpoint.write.manifest import Manifest, read_manifest

__all__ = [
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
    "verify_checkpoint",
]
