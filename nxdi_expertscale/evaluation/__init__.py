"""A quantized checkpoint against its original, on a CPU, and the demo of it."""
