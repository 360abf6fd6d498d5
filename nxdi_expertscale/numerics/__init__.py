"""Pure functions on tensors, the only arithmetic on scales. Imports torch alone."""
