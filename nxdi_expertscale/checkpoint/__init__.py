"""A checkpoint on disk: read, plan, quantize in a stream, write, resume, verify."""

from nxdi_expertscale.checkpoint.quantize import QuantizationResult, quantize_checkpoint

__all__ = ["QuantizationResult", "quantize_checkpoint"]
