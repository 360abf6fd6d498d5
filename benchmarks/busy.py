"""What a benchmark says of the machine, and how it has all of its cores occupied."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


def machine() -> dict[str, Any]:
    """What it was measured on: cores, and how many others wanted them."""
    return {"cores": len(os.sched_getaffinity(0)), "load": round(os.getloadavg()[0], 1)}


@contextmanager
def occupied_cores(*, are_occupied: bool = True) -> Iterator[None]:
    """Keep all cores busy with processes of their own, or leave them as they are."""
    command = [sys.executable, "-c", "while True: pass"]
    with ExitStack() as stack:
        for _ in range(len(os.sched_getaffinity(0)) if are_occupied else 0):
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
        yield
