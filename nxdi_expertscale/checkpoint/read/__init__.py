"""A checkpoint on disk, opened and checked: files, config, tensors, values."""
