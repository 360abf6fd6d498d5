"""A checkpoint as it is found: files, config, tensors and their values, opened as one model."""
