"""``python -m tests.server.device_benchmark``: the benchmark for the device, without one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from benchmarks.trainium import run
from benchmarks.trainium.checks import Needs

if __name__ == "__main__":
    sys.exit(run.main(sys.argv[1:], Needs(device=Path(os.devnull))))
