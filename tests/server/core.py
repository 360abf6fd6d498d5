"""A core of a tensor-parallel model: ``python -m tests.server.core RANK STORE DESCRIPTOR``."""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from pathlib import Path

from vllm.plugins import load_general_plugins

from tests.server.device import serve_core

if __name__ == "__main__":
    # It builds the modules again, so it has to have the plugins of the process that compiled them.
    load_general_plugins()
    serve_core(int(sys.argv[1]), Path(sys.argv[2]), Connection(int(sys.argv[3])))
