"""How long a test waits for what should come."""

from __future__ import annotations

PATIENCE = 600.0
"""Seconds after which a process or a thread is given up: one that hangs, and not one that is slow
on a machine that is overloaded."""
