"""A finished folder in the vLLM that runs on GPUs, as far as it goes without one."""
