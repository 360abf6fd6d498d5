"""Patches functions of modules when they are imported; knows nothing of what they are for."""
