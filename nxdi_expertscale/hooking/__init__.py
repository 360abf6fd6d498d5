"""Patches functions when their modules are imported; independent of what the patches do."""
