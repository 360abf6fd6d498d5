"""A checkpoint as it is written: plan, shards, staging, manifest, provenance."""
