"""An FP8 checkpoint in the making: plan, stream, staging, manifest, provenance."""
