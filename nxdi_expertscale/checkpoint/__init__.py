"""A checkpoint on disk: read, plan, quantize in a stream, write, resume, verify."""
