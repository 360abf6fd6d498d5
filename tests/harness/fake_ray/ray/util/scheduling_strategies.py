"""On which node a process is started."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class NodeAffinitySchedulingStrategy:
    node_id: str
    soft: bool
