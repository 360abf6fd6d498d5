"""Hostile checkpoints: recipes that spoil a good one, and what must hold however it is spoilt.

``corpus/`` keeps recipes that once broke a reader, or nearly did. ``python -m tests.fuzz`` looks
for new ones for as long as it is told.
"""
